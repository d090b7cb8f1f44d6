"""Writing to a disk that may be full: waiting for room, and what to say when none comes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from hetrain.public.disk import is_full, reason_of
from hetrain.public.errors import StorageError
from hetrain.train.signals import Stop

_log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.2, 5.0


def write_when_there_is_room(write: Callable[[], object], what: str, wait_s: float, stop: Stop) -> None:
    """Calls `write`, again and again while the disk is full.

    Args:
        write: raises `OSError` when it fails, and may then be called again.
        what: what is written, for messages.
        wait_s: seconds after which it gives up.
        stop: ends the wait as soon as it returns true or raises `KeyboardInterrupt`.

    Raises:
        StorageError: it could not be written: the disk stayed full, or there is another reason.
    """
    end, pause, announced = time.monotonic() + wait_s, _FIRST_PAUSE_S, False
    while True:
        try:
            write()
        except OSError as error:
            if not is_full(error) or time.monotonic() >= end or _is_stopped(stop):
                raise StorageError(f"{what} cannot be written: {reason_of(error)}") from error
            if not announced:
                _log.warning(
                    "%s cannot be written: %s; the run waits up to %g s for room",
                    what,
                    reason_of(error),
                    wait_s,
                )
            announced = True
        else:
            if announced:
                _log.warning("%s is written: the run goes on", what)
            return
        try:
            time.sleep(max(0.0, min(pause, end - time.monotonic())))
        except KeyboardInterrupt:
            end = time.monotonic()
        pause = min(2 * pause, _MAX_PAUSE_S)


def append_whole(descriptor: int, line: bytes) -> None:
    """Appends to a file that was opened for that. Raises `OSError`; no part of the line is then there."""
    begin, rest = os.fstat(descriptor).st_size, memoryview(line)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError:
        os.ftruncate(descriptor, begin)
        raise


def _is_stopped(stop: Stop) -> bool:
    try:
        return stop()
    except KeyboardInterrupt:
        return True


def after_failure(error: StorageError, output: Path, saved: str, newest: str) -> StorageError:
    """`error`, with what was written all the same and what to do.

    Args:
        error: what could not be written.
        output: the run's directory.
        saved: what was written of the run's last state, as a sentence.
        newest: the name of the newest checkpoint; empty if there is none.
    """
    hint = "Make room on this disk, then start anew"
    if newest:
        hint = (
            f"Make room on this disk, then go on from {newest}: the same settings and "
            "`resume_from_checkpoint` latest"
        )
    return StorageError(f"{error.what}; {saved}", where=str(output), hint=hint)
