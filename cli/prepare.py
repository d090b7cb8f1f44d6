"""`hetrain prepare`: a model's hints, ahead of time."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from cli.console import log_errors_only
from cli.options import AsJson, Quiet, option
from cli.progress import PreparationDisplay
from hetrain import api
from hetrain.config import OutsourcingConfig, RunSpec

_ALL = list(OutsourcingConfig.outsource)


def prepare(
    model: Annotated[str, typer.Argument(help="smollm2-135m, a Hugging Face directory, or a hub id.")],
    workers: Annotated[str | None, option(RunSpec, "workers")] = None,
    outsource: Annotated[list[str], option(OutsourcingConfig, "outsource")] = _ALL,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Have workers compute a model's products with your public masks, so that its first job starts at once.

    Jobs do it themselves where it is missing. The products are verified and kept in the cache.
    """
    if quiet or as_json:
        log_errors_only()
    with PreparationDisplay(quiet=quiet or as_json) as display:
        result = api.prepare(model, workers=workers, outsource=outsource, on_prepare=display.on_prepare)
    if as_json:
        typer.echo(json.dumps(asdict(result), default=str))
    elif not quiet:
        typer.echo(str(result))
