"""`hetrain list`, `status`, `logs`, `wait`, `cancel` and `resume`: jobs that run and that have run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, NoReturn

import typer

from cli.options import AsJson, Quiet, as_options, option
from cli.submit import Detach, run_job
from hetrain import jobs
from hetrain.config import RunSpec
from hetrain.public.errors import HetrainError, Interrupted, JobDied
from hetrain.public.quantities import say_seconds
from hetrain.public.system import discard_stream


def _ids(incomplete: str) -> list[tuple[str, str]]:
    """For the completion of shells."""
    try:
        return [(job.id, f"{job.status}: {job.output_dir}") for job in jobs.list_jobs()]
    except HetrainError:
        return []


_HELP = "The job: its id, the first digits of it, or its output directory."
Job = Annotated[str, typer.Argument(help=_HELP, metavar="JOB", autocompletion=_ids)]
JobOrLast = Annotated[
    str | None,
    typer.Argument(
        help=_HELP, metavar="[JOB]", autocompletion=_ids, show_default="the one that has begun last"
    ),
]


def list_jobs(as_json: AsJson = False) -> None:
    """List your jobs: what runs, and what has run."""
    found = jobs.list_jobs()
    if as_json:
        for job in found:
            _print_json(job)
    elif found:
        _print_table(found)
    else:
        typer.echo("There is no job yet.", err=True)


def status(job: JobOrLast = None, as_json: AsJson = False) -> None:
    """Show how a job stands, and what to do next."""
    found = jobs.status(job)
    if as_json:
        _print_json(found)
    else:
        typer.echo("\n".join(f"{name:10}  {text}" for name, text in _rows(found)))


def logs(
    job: Job,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job is over. Ctrl-C leaves it running.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the job's metrics as JSON lines instead: of any job.")
    ] = False,
) -> None:
    """Print what a detached job has printed."""
    read = jobs.read_metrics if as_json else jobs.read_log
    chunks = read(job, until_over=follow)
    try:
        _write(chunks)
    except KeyboardInterrupt:
        _leave(job)


def wait(job: Job, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Wait until a job is over, and exit as it did: with its exit code."""
    try:
        found = jobs.wait(job)
    except KeyboardInterrupt:
        _leave(job)
    _say(found, as_json=as_json, quiet=quiet)
    if found.status is jobs.Status.DIED:
        raise JobDied("the job's process has ended without a word", where=found.id, hint=found.advice)
    if found.exit_code:
        typer.echo(as_options(f"error: {found.error}"), err=True)
        raise typer.Exit(found.exit_code)


def cancel(
    job: Job,
    now: Annotated[bool, typer.Option("--now", help="End it at once, as Ctrl-C twice does.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Stop a job as Ctrl-C does: it finishes the updates that have begun and writes adapter and checkpoint.

    A second time ends it at once, as --now does. Returns when the job has noticed; `hetrain wait` waits for
    its end.
    """
    _say(jobs.cancel(job, now=now), as_json=as_json, quiet=quiet)


def resume(
    job: Job,
    workers: Annotated[str | None, option(RunSpec, "workers")] = None,
    detach: Detach = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Go on with a job that was stopped, has failed or died: from its last checkpoint, with its settings."""
    run_job(jobs.to_resume(job, workers=workers), detach=detach, as_json=as_json, quiet=quiet)


def _leave(job: str) -> NoReturn:
    typer.echo(f"The job goes on; `hetrain cancel {job}` stops it.", err=True)
    raise typer.Exit(Interrupted.exit_code)


def _write(chunks: Iterable[bytes]) -> None:
    output = sys.stdout.buffer
    try:
        for chunk in chunks:
            output.write(chunk)
            output.flush()
    except BrokenPipeError:  # as of `hetrain logs JOB | head`
        discard_stream(sys.stdout.fileno())


def _say(job: jobs.JobStatus, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        _print_json(job)
    elif not quiet:
        typer.echo(f"{job.id}  {job.status}{_progress(job)}  {job.output_dir}")


def _print_json(job: jobs.JobStatus) -> None:
    typer.echo(json.dumps(asdict(job), default=_plain))


def _plain(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _print_table(found: list[jobs.JobStatus]) -> None:
    """Columns as wide as they have to be: another program may read them."""
    lines = [("ID", "STATUS", "UPDATES", "LOSS", "BEGUN", "OUTPUT")]
    lines += [
        (job.id, str(job.status), _steps(job), _loss(job), _local(job.begun), str(job.output_dir))
        for job in found
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def _rows(job: jobs.JobStatus) -> Iterable[tuple[str, str]]:
    yield "job", job.id
    yield "status", f"{job.status}{f' (exit code {job.exit_code})' if job.exit_code else ''}"
    if job.error:
        yield "error", as_options(job.error)
    if job.step is not None:
        yield "updates", f"{_steps(job)} in {say_seconds(job.elapsed_s or 0)}, last loss {_loss(job)}"
    yield "begun", _local(job.begun)
    if job.ended:
        yield "ended", _local(job.ended)
    yield "process", f"{job.pid} on {job.host}"
    yield "output", str(job.output_dir)
    if job.log:
        yield "log", str(job.log)
    if job.advice:
        yield "next", job.advice


def _progress(job: jobs.JobStatus) -> str:
    return f" after {_steps(job)} updates" if job.step is not None else ""


def _steps(job: jobs.JobStatus) -> str:
    return "-" if job.step is None else f"{job.step}/{job.total_steps}"


def _loss(job: jobs.JobStatus) -> str:
    return "-" if job.loss is None else f"{job.loss:.3f}"


def _local(time: datetime) -> str:
    return f"{time.astimezone():%Y-%m-%d %H:%M:%S}"
