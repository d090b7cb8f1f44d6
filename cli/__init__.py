"""The command line: one Typer file per command, no logic of its own."""
