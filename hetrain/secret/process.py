"""Keeping the memory of a process that holds secrets to itself."""

from __future__ import annotations

import ctypes
import resource
import sys
from contextlib import suppress

_PR_SET_DUMPABLE = 4


def protect_memory() -> None:
    """Turns core dumps of this process off, and lets no other process of its user read its memory.

    For good: freed memory may hold secrets still. On Linux a debugger, too, then needs root. Children get
    the limit on core dumps, and may dump where they raise it.
    """
    with suppress(OSError, ValueError):
        _, most = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (0, most))
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
