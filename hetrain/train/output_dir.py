"""The output directory of a run: adapter, metrics.jsonl, job.json. Files appear whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from hetrain.jobs.files import JOB_FILE, METRICS_FILE
from hetrain.public.disk import is_full, os_errors, reason_of, replace_text
from hetrain.public.errors import StorageError, UsageError
from hetrain.train.checkpoint import ADAPTER_FILE, checkpoint_steps, remove_checkpoint
from hetrain.train.metrics import MicroBatchMetrics
from hetrain.train.output_lock import OutputLock
from hetrain.train.records import EVALUATIONS_FILE
from hetrain.train.storage import append_whole

_log = logging.getLogger(__name__)

_SCRATCH = (".checkpoint-*", ".adapter", ".*.new")
_RESERVE = ".reserve"


class OutputDirectory:
    """The directory of one run, which no other run may use meanwhile.

    Args:
        path: the directory, which need not exist yet; it is made for this user alone.
        overwrite: whether the files of another run may be replaced.
        keep: the update of the checkpoint in this directory from which the run goes on: what was written up
            to then stays. None for a run that starts anew.

    Raises:
        UsageError: it holds another run's adapter or checkpoints and `overwrite` is false, another run
            writes there now, or it cannot be made.
        StorageError: its disk is full.
    """

    def __init__(self, path: Path, *, overwrite: bool, keep: int | None = None) -> None:
        self.path = path
        self._keep = keep
        self._metrics = -1
        if keep is None and not overwrite:
            require_unused(path)
        _make(path)
        self._lock = OutputLock(path)

    @property
    def log_file(self) -> Path:
        """The log of an embedded broker and worker."""
        return self.path / "worker.log"

    def measure(self, write: Callable[[Path], None]) -> int:
        """The bytes of the files that `write` makes in a directory, which is then removed.

        Raises:
            StorageError: they cannot be written.
        """
        self._remove_scratch()
        scratch = self.path / ".adapter"
        try:
            with os_errors():
                scratch.mkdir(0o700)
                write(scratch)
            return sum(file.stat().st_size for file in scratch.iterdir())
        except OSError as error:
            raise _no_room(f"the adapter's files cannot be written: {reason_of(error)}", self.path) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def reserve(self, nbytes: int) -> None:
        """Takes room on the disk for what the run writes last, until `release_reserve`.

        Raises:
            StorageError: there is not so much.
        """
        self._remove_scratch()
        try:
            descriptor = os.open(self.path / _RESERVE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, nbytes)
            finally:
                os.close(descriptor)
        except OSError as error:
            self.release_reserve()
            raise _no_room(
                f"the adapter and a checkpoint take up to {nbytes / 1e6:.0f} MB, for which there is no room: "
                f"{reason_of(error)}",
                self.path,
            ) from error

    def release_reserve(self) -> None:
        """Gives back what `reserve` took."""
        with suppress(OSError):
            (self.path / _RESERVE).unlink()

    def add(self, metrics: MicroBatchMetrics) -> None:
        """Appends a line to metrics.jsonl. Raises `OSError`; no part of the line is then there."""
        if self._metrics < 0:
            self._metrics = self._begin()
        append_whole(self._metrics, (json.dumps(metrics.record()) + "\n").encode())

    def write_job(self, job: Mapping[str, object]) -> None:
        """Replaces job.json. Raises `OSError`."""
        replace_text(self.path / JOB_FILE, json.dumps(job, indent=2, default=str) + "\n")

    def write_card(self, text: str) -> None:
        """Replaces README.md, the adapter's model card."""
        replace_text(self.path / "README.md", text)

    def save_adapter(self, write: Callable[[Path], None]) -> None:
        """Moves the files that `write` makes into this directory, the adapter's weights last.

        Raises:
            OSError: it cannot be written.
        """
        scratch = self.path / ".adapter"
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            with os_errors():
                scratch.mkdir(0o700)
                write(scratch)
            for file in sorted(scratch.iterdir(), key=lambda file: file.name == ADAPTER_FILE):
                os.replace(file, self.path / file.name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def close(self) -> None:
        """Closes metrics.jsonl, and lets other runs use the directory."""
        if self._metrics >= 0:
            os.close(self._metrics)
            self._metrics = -1
        self.release_reserve()
        self._lock.release()

    def _begin(self) -> int:
        """Removes other runs' files, with the first metrics: a run that never starts removes nothing."""
        for step in checkpoint_steps(self.path):
            if step > (self._keep or 0):
                remove_checkpoint(self.path, step)
        if not self._keep:
            (self.path / "report.html").unlink(missing_ok=True)
        for name in (EVALUATIONS_FILE, METRICS_FILE):
            self._cut(self.path / name)
        return os.open(self.path / METRICS_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def _cut(self, records: Path) -> None:
        """Keeps the lines up to the update that the run goes on from."""
        if not self._keep:
            records.unlink(missing_ok=True)
        elif records.exists():
            lines = records.read_text("utf-8", "replace").splitlines()
            kept = [line for line in lines if _step_of(line) <= self._keep]
            replace_text(records, "".join(f"{line}\n" for line in kept))

    def _remove_scratch(self) -> None:
        """Removes what a run that was killed was writing."""
        for pattern in _SCRATCH:
            for leftover in self.path.glob(pattern):
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)


def require_unused(path: Path) -> None:
    """Raises `UsageError` if a run's adapter or checkpoints are there."""
    if (path / ADAPTER_FILE).exists():
        found, resume = "an adapter", ""
    elif checkpoint_steps(path):
        found, resume = "a checkpoint", "go on from it with `resume_from_checkpoint` latest, "
    else:
        return
    raise UsageError(
        f"there is {found} already",
        where=str(path),
        hint=f"{resume}choose another `output_dir`, or set `overwrite_output_dir`",
    )


def _make(path: Path) -> None:
    """The directory, for this user alone if it is new."""
    try:
        path.mkdir(0o700, parents=True, exist_ok=True)
        is_open = bool(path.stat().st_mode & 0o077)
    except OSError as error:
        kind = StorageError if is_full(error) else UsageError
        raise kind(
            f"cannot be written: {reason_of(error)}", where=str(path), hint="choose another `output_dir`"
        ) from error
    if is_open:
        _log.warning("%s: other users of this machine may enter it, and read the adapter: chmod 700", path)


def _no_room(what: str, path: Path) -> StorageError:
    return StorageError(what, where=str(path), hint="make room on this disk, or choose another `output_dir`")


def _step_of(line: str) -> float:
    """The update of a line of records; infinity where a run was killed while it wrote the line."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
