"""The command line: one Typer file per command, without logic."""
