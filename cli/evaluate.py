"""`hetrain eval`: loss and perplexity."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from cli.console import log_errors_only
from cli.options import AsJson, Quiet, from_configuration
from cli.progress import PreparationDisplay
from hetrain import api
from hetrain.config import EvaluationSpec


@from_configuration
def evaluate(spec: EvaluationSpec, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Loss and perplexity of a data set, on workers that see only ciphertexts."""
    if quiet or as_json:
        log_errors_only()
    with PreparationDisplay(quiet=quiet or as_json) as display:
        result = api.evaluate(**vars(spec), on_prepare=display.on_prepare)
    if as_json:
        typer.echo(json.dumps(asdict(result)))
    elif not quiet:
        typer.echo(str(result))
