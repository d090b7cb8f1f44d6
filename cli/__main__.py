"""`python -m cli` is `hetrain`."""

from cli.main import main

main()
