"""One run at a time in an output directory."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hetrain.public.errors import StorageError, UsageError

_log = logging.getLogger(__name__)

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_OWNER_BYTES = 1000


class OutputLock:
    """The lock of an output directory, held until `release` or the end of this process.

    A lock of the system (flock) on the file ``.lock``, whose content names the owner. ``filelock`` would
    empty the file before it knows whether it has the lock.

    Args:
        directory: must exist.

    Raises:
        UsageError: another run holds it; names its process and machine.
        StorageError: the file cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / ".lock"
        try:
            self._descriptor = self._acquire(directory)
        except OSError as error:
            raise StorageError(
                f"cannot be written: {error.strerror}",
                where=str(directory),
                hint="choose another `output_dir`, or make room on this disk",
            ) from error

    def release(self) -> None:
        """Lets others run here. Does nothing the second time."""
        if self._descriptor < 0:
            return
        with suppress(OSError):
            self._path.unlink()
        os.close(self._descriptor)
        self._descriptor = -1

    def _acquire(self, directory: Path) -> int:
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                _lock(descriptor, directory)
                if _is_file(self._path, descriptor):
                    _take_over(descriptor, directory)
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its owner has removed it meanwhile


def _lock(descriptor: int, directory: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _owner(descriptor)
        raise UsageError(
            f"another run writes here: process {owner.get('pid', '?')} on {owner.get('host', '?')}, "
            f"since {owner.get('since', '?')}",
            where=str(directory),
            hint="wait for its end or stop it, or choose another `output_dir`",
        ) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _log.warning("%s: this file system has no locks; take care that no other run writes here", directory)


def _take_over(descriptor: int, directory: Path) -> None:
    """Writes this process's name into the lock, and says whose was there."""
    if former := _owner(descriptor):
        _log.warning(
            "%s: the run of process %s on %s was killed; this one takes over",
            directory,
            former.get("pid", "?"),
            former.get("host", "?"),
        )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now})
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def _owner(descriptor: int) -> dict[str, Any]:
    try:
        owner = json.loads(os.pread(descriptor, _OWNER_BYTES, 0))
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
