"""Reading a file that grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

_POLL_S = 0.2
_CHUNK_BYTES = 1 << 20


def follow(
    path: Path, is_over: Callable[[], bool], pause: Callable[[], object] | None = None
) -> Iterator[bytes]:
    """Yields what stands in a file, and then what is added to it, until `is_over` and all of it was read.

    A file that is not there yet counts as empty. One that was replaced by a shorter one is read on from its
    end.

    Args:
        path: the file.
        is_over: whether nothing more will be added.
        pause: called between two reads that have found nothing; None sleeps.
    """
    position = 0
    while True:
        was_over = is_over()  # before the read: what is written until then is read
        chunk, position = _read(path, position)
        if chunk:
            yield chunk
        elif was_over:
            return
        else:
            (pause or _sleep)()


def _read(path: Path, position: int) -> tuple[bytes, int]:
    try:
        with path.open("rb") as file:
            begin = min(position, file.seek(0, 2))
            file.seek(begin)
            chunk = file.read(_CHUNK_BYTES)
    except FileNotFoundError:
        return b"", position
    return chunk, begin + len(chunk)


def _sleep() -> None:
    time.sleep(_POLL_S)
