"""Where jobs of this user are: a file for each in the state directory, which names its output directory.

Everything else about a job lies there. A pointer whose directory is gone, or has another job now, is removed
when it is met.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hetrain.public.disk import reason_of, replace_text
from hetrain.public.errors import UsageError
from hetrain.public.settings import ClientSettings

_log = logging.getLogger(__name__)


def register(job_id: str, output_dir: Path) -> None:
    """Remembers where a job is. That it cannot is a warning: its output directory names it as well."""
    directory = _directory()
    try:
        directory.mkdir(0o700, parents=True, exist_ok=True)
        replace_text(directory / f"{job_id}.json", json.dumps({"output_dir": str(output_dir)}) + "\n")
    except OSError as error:
        _log.warning(
            "the job will not be listed: %s cannot be written: %s; set HETRAIN_STATE to a directory of yours",
            directory,
            reason_of(error),
        )


def pointers() -> dict[str, Path]:
    """Output directories by the ids of their jobs, as they were registered."""
    found: dict[str, Path] = {}
    for path in sorted(_directory().glob("[!.]*.json")):
        with suppress(OSError, ValueError, TypeError, KeyError):
            found[path.stem] = Path(json.loads(path.read_bytes())["output_dir"])
    return found


def forget(job_id: str) -> None:
    """Removes a pointer."""
    with suppress(OSError):
        (_directory() / f"{job_id}.json").unlink()


def choose(name: str, ids: Sequence[str]) -> str:
    """The id that `name` means: itself, or the one that begins with it.

    Raises:
        UsageError: there is none, or there are several.
    """
    matches = [each for each in ids if each == name] or [
        each for each in ids if name and each.startswith(name)
    ]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UsageError(f"{name!r} may be {', '.join(sorted(matches))}", hint="write more of the id")
    raise UsageError(
        f"there is no job {name!r}",
        hint="`hetrain list` shows all; give an id, its first digits, or an output directory",
    )


def _directory() -> Path:
    return ClientSettings().state / "jobs"
