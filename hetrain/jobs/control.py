"""Waiting for jobs, stopping them, and going on with them."""

from __future__ import annotations

import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

from hetrain.config import LATEST, JobSpec
from hetrain.jobs.run import Run
from hetrain.jobs.settings import from_json
from hetrain.jobs.status import JobStatus, Status, describe, has_checkpoint
from hetrain.jobs.store import require_run
from hetrain.public.errors import UsageError

_POLL_S = 0.2
_NOTICE_S = 30.0


def wait_for(output_dir: Path) -> JobStatus:
    """Returns when no process works on the job any more: how it then stands."""
    while not (found := describe(require_run(output_dir), output_dir)).status.is_over:
        time.sleep(_POLL_S)
    return found


def stop(output_dir: Path, *, now: bool) -> JobStatus:
    """Asks a job's process to stop, as Ctrl-C does; if it is stopping already, or with `now`, at once.

    Returns when it has noticed, or half a minute later.

    Raises:
        UsageError: the job is over, or its process is out of reach.
    """
    found = describe(require_run(output_dir), output_dir)
    if found.status.is_over:
        raise UsageError(f"the job is over: {found.status}", where=found.id, hint=found.advice)
    was_stopping = found.status is Status.STOPPING
    _signal(found)
    if was_stopping:
        return _await_notice(output_dir, Status.STOPPING, _POLL_S)
    found = _await_notice(output_dir, found.status, _NOTICE_S)
    # While it prepares, one signal ends it.
    if now and found.status in (Status.RUNNING, Status.STOPPING):
        _signal(found)
    return found


def to_resume(run: Run, output_dir: Path, workers: str | None) -> JobSpec:
    """The settings with which `hetrain.finetune` goes on with a job, from its last checkpoint if it has one.

    Args:
        run: its last run.
        output_dir: where it lies.
        workers: the broker's address; None for a job that had a broker and a worker of its own.

    Raises:
        UsageError: the job is done or goes on, or cannot be started from what is known of it.
    """
    status = describe(run, output_dir).status
    if status is Status.DONE:
        raise UsageError("the job is done", where=run.id, hint=f"its adapter lies in {output_dir}")
    if not status.is_over:
        raise UsageError(f"the job is {status}", where=run.id, hint=f"`hetrain logs -f {run.id}` follows it")
    if run.uses_broker and workers is None:
        raise UsageError(
            "the job had workers behind a broker, whose address is not kept",
            where=run.id,
            hint="set HETRAIN_BROKER_URL, or give `workers`",
        )
    try:
        spec = from_json(run.settings)
    except ValueError as error:
        raise UsageError(f"the job's settings cannot be read: {error}", where=str(output_dir)) from error
    if "-" in spec.dataset:
        raise UsageError(
            "the job's rows came from standard input, and are not kept",
            where=run.id,
            hint="give them again: `hetrain submit -`, the same settings, `resume_from_checkpoint` latest",
        )
    last = LATEST if has_checkpoint(output_dir) else None
    return replace(spec, output_dir=output_dir, workers=workers, resume_from_checkpoint=last)


def _signal(job: JobStatus) -> None:
    """SIGTERM, which unlike SIGINT counts in background jobs of a shell, too."""
    if job.host != socket.gethostname():
        raise UsageError(f"the job runs on {job.host}", where=job.id, hint="stop it there")
    try:
        os.kill(job.pid, signal.SIGTERM)
    except ProcessLookupError:
        return  # it has ended meanwhile
    except PermissionError as error:
        raise UsageError(
            f"process {job.pid} belongs to another user", where=job.id, hint="ask them to stop it"
        ) from error


def _await_notice(output_dir: Path, before: Status, seconds: float) -> JobStatus:
    end = time.monotonic() + seconds
    while True:
        found = describe(require_run(output_dir), output_dir)
        if found.status is not before or time.monotonic() > end:
            return found
        time.sleep(_POLL_S)
