"""The console of standard error, which log and progress line share: else each would write into the other."""

from __future__ import annotations

from functools import cache

from rich.console import Console


@cache
def stderr_console() -> Console:
    """The one console of standard error."""
    return Console(stderr=True)
