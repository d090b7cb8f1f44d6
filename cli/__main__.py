"""The program `hetrain`, and `python -m cli`."""

from __future__ import annotations

from hetrain.public.allocator import restart_tuned


def start() -> None:
    """Entry point of the console script."""
    restart_tuned()
    from cli.main import main

    main()


if __name__ == "__main__":
    start()
