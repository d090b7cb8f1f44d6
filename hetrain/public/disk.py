"""Errors of a disk: whether it is full, and what a user is told of a cache that cannot be used."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from hetrain.public.errors import HetrainError, StorageError, UsageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_full(error: OSError) -> bool:
    """Whether a write has failed for want of room, which may come: a full disk, a quota, a size limit."""
    return error.errno in _FULL


@contextmanager
def where_there_is_room() -> Iterator[None]:
    """Loses what is written within and has no room: a full disk pauses a job, its words must not end it."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise


def reason_of(error: OSError) -> str:
    """Why it has failed, in a few words."""
    return error.strerror or str(error) or type(error).__name__


def replace_text(path: Path, text: str) -> None:
    """Gives `path` this content, in UTF-8, whole or not at all. Raises `OSError`."""
    scratch = path.with_name(f".{path.name}.new")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError:
        with suppress(OSError):
            scratch.unlink()
        raise


@contextmanager
def os_errors() -> Iterator[None]:
    """Raises what safetensors and tokenizers raise for a failed write as the `OSError` that it was."""
    try:
        yield
    except (OSError, HetrainError):
        raise
    except Exception as error:  # tokenizers raises no subclass of it
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None and not isinstance(error, SafetensorError):
            raise
        raise OSError(int(found[1]) if found else errno.EIO, str(error)) from error


@contextmanager
def cache_errors(path: Path) -> Iterator[None]:
    """Maps the `OSError` of a read or write at `path`, in the cache.

    Raises:
        StorageError: the disk is full.
        UsageError: the cache cannot be used otherwise.
    """
    try:
        with os_errors():
            yield
    except OSError as error:
        raise cache_error(error, path) from error


def cache_error(error: OSError, path: Path) -> HetrainError:
    """What a user is told of it."""
    if is_full(error):
        return StorageError(
            f"the cache cannot be written: {reason_of(error)}",
            where=str(path),
            hint="make room on this disk (`hetrain cache` shows what lies there), or set HETRAIN_CACHE to a "
            "directory on a larger one",
        )
    return UsageError(
        f"the cache cannot be used: {reason_of(error)}",
        where=str(path),
        hint="set HETRAIN_CACHE to a directory of yours",
    )
