"""What becomes of a job: its status, its progress, and what to do next."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from hetrain.jobs.files import LOG_FILE, METRICS_FILE
from hetrain.jobs.process import Liveness, liveness
from hetrain.jobs.run import Phase, Run
from hetrain.public.errors import Interrupted

_TAIL_BYTES = 1 << 16


class Status(StrEnum):
    """The statuses of a job."""

    PREPARING = "preparing"
    RUNNING = "running"
    STOPPING = "stopping"
    DONE = "done"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    DIED = "died"

    @property
    def is_over(self) -> bool:
        """Whether no process works on the job any more."""
        return self not in (Status.PREPARING, Status.RUNNING, Status.STOPPING)


@dataclass(frozen=True)
class JobStatus:
    """A job as it stands.

    Attributes:
        id: its name.
        status: see `Status`; ``died``: its process has ended without a word.
        output_dir: where everything about it lies.
        step: the update that was made last; None before the first,
        total_steps: of so many.
        loss: of the last micro-batch.
        elapsed_s: seconds of training.
        begun: when its last run began,
        ended: and ended.
        pid: the process of that run,
        host: on this machine.
        exit_code: of that run, see docs/reference/exit-codes.md; None while it runs or if it died.
        error: what went wrong.
        log: the file with its output; None for a job that was not detached.
        advice: what to do next, as a command.
    """

    id: str
    status: Status
    output_dir: Path
    step: int | None
    total_steps: int | None
    loss: float | None
    elapsed_s: float | None
    begun: datetime
    ended: datetime | None
    pid: int
    host: str
    exit_code: int | None
    error: str
    log: Path | None
    advice: str


def status_of(phase: Phase, exit_code: int | None, alive: Liveness) -> Status:
    """The status of a job whose run is, or was, in `phase`, and ended with `exit_code` if it has ended.

    A process on another machine is taken at its word.
    """
    if exit_code is not None:
        return {0: Status.DONE, Interrupted.exit_code: Status.INTERRUPTED}.get(exit_code, Status.FAILED)
    return Status.DIED if alive is Liveness.GONE else Status(phase)


def advice_for(status: Status, job_id: str, *, has_checkpoint: bool) -> str:
    """What to do next with a job, as a sentence; empty if there is nothing."""
    if status is Status.DONE:
        return ""
    if status is Status.STOPPING:
        return f"`hetrain cancel {job_id}` again ends it at once"
    if not status.is_over:
        return f"`hetrain logs -f {job_id}` follows it, `hetrain cancel {job_id}` stops it"
    how = "goes on from its last checkpoint" if has_checkpoint else "starts it anew: it has no checkpoint"
    return f"`hetrain resume {job_id}` {how}"


def describe(run: Run, output_dir: Path) -> JobStatus:
    """The job whose last run is `run`, as it stands now."""
    status = status_of(run.phase, run.exit_code, liveness(run.process))
    last = last_metrics(output_dir, 0.0 if run.is_resumed else run.begun.timestamp())
    log = output_dir / LOG_FILE
    return JobStatus(
        id=run.id,
        status=status,
        output_dir=output_dir,
        step=last.get("step"),
        total_steps=last.get("total_steps"),
        loss=last.get("loss"),
        elapsed_s=last.get("elapsed_s"),
        begun=run.begun,
        ended=run.ended,
        pid=run.process.pid,
        host=run.process.host,
        exit_code=run.exit_code,
        error=run.error,
        log=log if log.is_file() else None,
        advice=advice_for(status, run.id, has_checkpoint=has_checkpoint(output_dir)),
    )


def has_checkpoint(output_dir: Path) -> bool:
    """Whether there is a checkpoint in an output directory."""
    return any(path.is_dir() for path in output_dir.glob("checkpoint-*"))


def last_metrics(output_dir: Path, since: float) -> dict[str, Any]:
    """The last whole line of metrics.jsonl; empty if nothing was written `since` that second of the epoch."""
    try:
        with (output_dir / METRICS_FILE).open("rb") as file:
            found = os.fstat(file.fileno())
            file.seek(max(0, found.st_size - _TAIL_BYTES))
            lines = file.read().splitlines() if found.st_mtime >= since else []
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError):
            continue
    return {}
