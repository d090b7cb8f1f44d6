"""Jobs of this user: what runs, what has run, and how to stop it or go on with it.

    import hetrain
    for job in hetrain.jobs.list_jobs():
        print(job.id, job.status, job.step, job.output_dir)
    hetrain.finetune(**vars(hetrain.jobs.to_resume("3f9a")))

A job is named by its id, the first digits of one, or its output directory, where all of its state lies. No
torch is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from os import PathLike, fspath

from hetrain.config import JobSpec
from hetrain.jobs import control, store
from hetrain.jobs.files import LOG_FILE, METRICS_FILE
from hetrain.jobs.launch import Launch, Launcher, launch
from hetrain.jobs.log import follow
from hetrain.jobs.run import read_run
from hetrain.jobs.status import JobStatus, Status, describe
from hetrain.public.errors import UsageError

__all__ = [
    "JobName",
    "JobStatus",
    "Launch",
    "Launcher",
    "Status",
    "cancel",
    "launch",
    "list_jobs",
    "read_log",
    "read_metrics",
    "status",
    "to_resume",
    "wait",
]

JobName = str | PathLike[str]


def list_jobs() -> list[JobStatus]:
    """All jobs of this user whose output directories are still there, the newest last."""
    found = []
    for directory in store.known_jobs().values():
        try:
            run = read_run(directory)
        except UsageError:  # of another version
            continue
        if run is not None:
            found.append(describe(run, directory))
    return sorted(found, key=lambda job: job.begun)


def status(job: JobName | None = None) -> JobStatus:
    """A job as it stands now; None takes the one that has begun last.

    Raises:
        UsageError: there is no such job.
    """
    if job is None:
        if not (jobs := list_jobs()):
            raise UsageError("there is no job yet", hint="`hetrain submit` starts one")
        return jobs[-1]
    directory = store.find(fspath(job))
    return describe(store.require_run(directory), directory)


def wait(job: JobName) -> JobStatus:
    """Returns when no process works on a job any more: how it then stands.

    Raises:
        UsageError: there is no such job.
    """
    return control.wait_for(store.find(fspath(job)))


def cancel(job: JobName, *, now: bool = False) -> JobStatus:
    """Stops a job as Ctrl-C does: the updates that have begun are finished, adapter and checkpoint written.

    Returns when its process has noticed, or half a minute later.

    Args:
        job: an id, the first digits of one, or an output directory.
        now: end it at once, as Ctrl-C twice does: adapter and checkpoint are those of the last update. A
            second call does so, too.

    Raises:
        UsageError: there is no such job, it is over, or its process is out of reach.
    """
    return control.stop(store.find(fspath(job)), now=now)


def to_resume(job: JobName, *, workers: str | None = None) -> JobSpec:
    """The settings with which `hetrain.finetune` goes on with a job, from its last checkpoint if it has one.

    Args:
        job: as of `cancel`.
        workers: the broker's address; None for a job that had a broker and a worker of its own.

    Raises:
        UsageError: the job is done or goes on, or cannot be started from what is known of it.
    """
    directory = store.find(fspath(job))
    return control.to_resume(store.require_run(directory), directory, workers)


def read_log(job: JobName, *, until_over: bool = False) -> Iterator[bytes]:
    """What a detached job has printed.

    Args:
        job: as of `cancel`.
        until_over: yield also what it prints from now on, until it is over.

    Raises:
        UsageError: there is no such job, or it was not detached.
    """
    found = status(job)
    if found.log is None:
        raise UsageError(
            f"the job has no {LOG_FILE}: it printed to the terminal, or the program, that ran it",
            where=found.id,
            hint="`hetrain logs --json` prints its metrics",
        )
    return follow(found.log, _is_over(found, until_over=until_over))


def read_metrics(job: JobName, *, until_over: bool = False) -> Iterator[bytes]:
    """The lines of a job's metrics.jsonl, as `read_log`."""
    found = status(job)
    return follow(found.output_dir / METRICS_FILE, _is_over(found, until_over=until_over))


def _is_over(job: JobStatus, *, until_over: bool) -> Callable[[], bool]:
    if not until_over:
        return lambda: True
    return lambda: describe(store.require_run(job.output_dir), job.output_dir).status.is_over
