"""`hetrain submit`: train an adapter."""

from __future__ import annotations

import json
import logging
from typing import Annotated

import typer
from rich.console import Console

from cli.options import AsJson, Quiet, from_configuration
from cli.plan import print_plan
from cli.progress import TrainingDisplay
from hetrain import api
from hetrain.config import JobSpec

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check everything up to the first update, print what would run, and write nothing.",
    ),
]


@from_configuration
def submit(spec: JobSpec, dry_run: DryRun = False, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Fine-tune a model with LoRA on workers that see only ciphertexts.

    Ctrl-C (or SIGTERM) once finishes the updates that have begun and writes adapter and checkpoint; twice
    leaves at once.
    """
    if quiet:
        logging.getLogger().setLevel(logging.ERROR)
    if dry_run:
        _print_dry_run(api.dry_run(**vars(spec)), spec, as_json=as_json, quiet=quiet)
        return
    with TrainingDisplay(as_json=as_json, quiet=quiet) as display:
        result = api.finetune(
            **vars(spec),
            on_step=display.on_step,
            on_stop=display.on_stop,
            on_prepare=display.on_prepare,
            on_evaluating=display.on_evaluating,
            on_evaluation=display.on_evaluation,
        )
    display.summary(result)


def _print_dry_run(found: api.DryRun, spec: JobSpec, *, as_json: bool, quiet: bool) -> None:
    figures = {
        "model": found.plan.plan.model,
        "digest": found.plan.plan.digest,
        "total_steps": found.total_steps,
        "done_steps": found.done_steps,
        "adapter_parameters": found.adapter_parameters,
        "held_out_rows": found.held_out_rows,
        "output_dir": str(found.output_dir),
    }
    if as_json:
        typer.echo(json.dumps({"event": "dry_run"} | figures))
        return
    console = Console(quiet=quiet)
    print_plan(console, found.plan)
    went = f", {found.done_steps} of them made" if found.done_steps else ""
    held = f", {found.held_out_rows} rows are held out" if found.held_out_rows else ""
    place = "a broker and a worker on this machine" if spec.workers is None else "the workers of the broker"
    console.print(
        f"{found.total_steps} updates{went} of an adapter of {found.adapter_parameters:,} numbers{held}; by "
        f"{place}, into {found.output_dir}. This was a dry run: nothing was started or written.",
        highlight=False,
    )
