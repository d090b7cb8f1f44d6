"""Standard error: one console, which log and progress line share, else each would write into the other."""

from __future__ import annotations

import logging
from functools import cache

from rich.console import Console


@cache
def stderr_console() -> Console:
    """The one console of standard error."""
    return Console(stderr=True)


def log_errors_only() -> None:
    """Keeps from the log what is no error."""
    logging.getLogger().setLevel(logging.ERROR)
