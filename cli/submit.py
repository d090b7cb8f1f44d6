"""`hetrain submit`: train an adapter, here or in the background."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli.console import debug_wanted, log_errors_only
from cli.options import AsJson, Quiet, from_configuration, option
from cli.plan import print_plan
from cli.progress import TrainingDisplay
from hetrain import api, jobs
from hetrain.config import ComparisonConfig, JobSpec

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check everything up to the first update, print what would run, and write nothing.",
    ),
]
Detach = Annotated[
    bool,
    typer.Option(
        "--detach",
        "-d",
        help="Return once the job has started; it goes on without this terminal. `hetrain list` shows it.",
    ),
]
_DETACHED = "run-detached"
_COMPARISON = ComparisonConfig()


@from_configuration
def submit(
    spec: JobSpec,
    dry_run: DryRun = False,
    detach: Detach = False,
    link: Annotated[str | None, option(ComparisonConfig, "link")] = None,
    round_trip_ms: Annotated[float | None, option(ComparisonConfig, "round_trip_ms")] = None,
    worker_speed: Annotated[float, option(ComparisonConfig, "worker_speed")] = _COMPARISON.worker_speed,
    client_memory: Annotated[int | None, option(ComparisonConfig, "client_memory")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model with LoRA on workers that see only ciphertexts.

    Ctrl-C (or SIGTERM) once finishes the updates that have begun and writes adapter and checkpoint; twice
    leaves at once.
    """
    comparison = ComparisonConfig(
        link=link, round_trip_ms=round_trip_ms, worker_speed=worker_speed, client_memory=client_memory
    )
    if dry_run:
        if quiet:
            log_errors_only()
        found = api.dry_run(**vars(spec), comparison=comparison)
        _print_dry_run(found, spec, as_json=as_json, quiet=quiet)
    else:
        run_job(spec, detach=detach, as_json=as_json, quiet=quiet, comparison=comparison)


def run_job(
    spec: JobSpec, *, detach: bool, as_json: bool, quiet: bool, comparison: ComparisonConfig = _COMPARISON
) -> None:
    """Trains here, or has another process do it."""
    if quiet:
        log_errors_only()
    if detach:
        _detach(api.with_chosen_groups(spec, comparison), as_json=as_json, quiet=quiet)
    else:
        _train(spec, comparison=comparison, as_json=as_json, quiet=quiet)


def run_detached(
    output_dir: Annotated[Path, typer.Argument(help="Names the job in lists of processes.")],
    descriptor: Annotated[int, typer.Argument(help="The socket of the process that has started this one.")],
) -> None:
    """What `hetrain submit --detach` starts."""
    launcher = jobs.Launcher(descriptor)
    _train(launcher.spec, on_start=launcher.started)


def _train(
    spec: JobSpec,
    *,
    comparison: ComparisonConfig = _COMPARISON,
    as_json: bool = False,
    quiet: bool = False,
    on_start: Callable[[str], object] | None = None,
) -> None:
    with TrainingDisplay(as_json=as_json, quiet=quiet) as display:
        train = partial(
            api.finetune,
            **vars(spec),
            comparison=comparison,
            on_step=display.on_step,
            on_stop=display.on_stop,
            on_prepare=display.on_prepare,
            on_evaluating=display.on_evaluating,
            on_evaluation=display.on_evaluation,
        )
        result = train() if on_start is None else train(on_start=on_start)
    display.summary(result)


def _detach(spec: JobSpec, *, as_json: bool, quiet: bool) -> None:
    debug = ["--debug"] if debug_wanted() else []
    command = [sys.executable, "-m", "cli", *debug, _DETACHED, str(spec.output_dir)]
    found = jobs.launch(spec, command)
    if not found.job_id:
        raise typer.Exit(found.exit_code)  # its error stands on this terminal already
    job = jobs.status(spec.output_dir)
    if as_json:
        typer.echo(json.dumps({"id": job.id, "output_dir": str(job.output_dir), "log": str(job.log)}))
        return
    typer.echo(f"{job.id}  {job.output_dir}")
    if not quiet:
        typer.echo(f"The job goes on in the background: {job.advice}", err=True)


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
