"""Standard error: what goes there, and the one console that log and progress line share."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from rich.console import Console

from hetrain.public.disk import is_full

_debug = {"wanted": False}


def set_debug(wanted: bool) -> None:
    """Sets whether the traceback of an error is printed, too."""
    _debug["wanted"] = wanted


def debug_wanted() -> bool:
    """Whether it is."""
    return _debug["wanted"]


@cache
def stderr_console() -> Console:
    """The console of standard error: with two, each would write into the other."""
    return Console(stderr=True)


def log_errors_only() -> None:
    """Keeps from the log what is no error."""
    logging.getLogger().setLevel(logging.ERROR)


@contextmanager
def where_there_is_room() -> Iterator[None]:
    """What is printed within may be lost where it goes to a file on a full disk: a job goes on without."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
