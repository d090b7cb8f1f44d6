"""Standard error: what goes there, and the one console that log and progress line share."""

from __future__ import annotations

import logging
from functools import cache

from rich.console import Console

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
