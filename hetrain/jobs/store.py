"""Finding jobs: by id, prefix or output directory."""

from __future__ import annotations

from pathlib import Path

from hetrain.jobs import registry
from hetrain.jobs.files import RUN_FILE
from hetrain.jobs.run import Run, read_run
from hetrain.public.errors import UsageError


def known_jobs() -> dict[str, Path]:
    """Output directories of the registered jobs by id; what is gone, or has another job now, is forgotten."""
    found = registry.pointers()
    for job_id, directory in list(found.items()):
        if not _holds(directory, job_id):
            registry.forget(job_id)
            del found[job_id]
    return found


def find(name: str) -> Path:
    """The output directory of the job that an id, the first digits of one, or the directory itself names.

    Raises:
        UsageError: there is none, or there are several.
    """
    known = known_jobs()
    if name not in known and (Path(name) / RUN_FILE).is_file():
        return Path(name).absolute()
    return known[registry.choose(name, list(known))]


def require_run(output_dir: Path) -> Run:
    """The last run in an output directory.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    run = read_run(output_dir)
    if run is None:
        raise UsageError(f"there is no {RUN_FILE}", where=str(output_dir), hint="its job was removed")
    return run


def _holds(directory: Path, job_id: str) -> bool:
    try:
        run = read_run(directory)
    except UsageError:
        return True  # of another version, perhaps
    return run is not None and run.id == job_id
