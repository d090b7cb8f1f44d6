"""`hetrain cache`: what lies in the cache."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from cli.options import AsJson
from hetrain import api

_MB = 1e6


def cache(
    names: Annotated[list[str] | None, typer.Argument(help="Parts of the cache; all by default.")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove them. No job should run meanwhile.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what lies in the cache, or clear it."""
    report = api.cache(names or (), clear=clear)
    if as_json:
        typer.echo(json.dumps(asdict(report) | {"nbytes": report.nbytes}, default=str))
        return
    for entry in report.entries:
        typer.echo(f"{entry.nbytes / _MB:10.1f} MB  {entry.name}: {entry.files} files, {entry.what}")
    verb = "removed from" if report.cleared else "in"
    typer.echo(f"{report.nbytes / _MB:10.1f} MB  {verb} {report.directory}")
