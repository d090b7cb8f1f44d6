"""What this process may use of its machine, and what its child processes inherit."""

from __future__ import annotations

import errno
import os
import sys
import termios
from pathlib import Path


def available_cores() -> int:
    """Cores that this process may run on: those of its affinity mask where the system has one, else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def flush_denormals(flush: bool = True) -> bool:
    """Has this thread, and those that it starts from now on, take denormal numbers for zero, or not.

    They make operations up to two hundred times as slow: a worker that provokes them could tell from the
    client's pace what it computes.

    Returns:
        Whether it took them for zero before.
    """
    import torch  # processes that compute nothing import this module too

    did = sys.float_info.min / 2 == 0
    torch.set_flush_denormal(flush)
    return did


def leave_dead_terminal() -> None:
    """Points the standard streams whose terminal was closed to /dev/null: a write to them would fail."""
    for stream in range(3):
        try:
            termios.tcgetattr(stream)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                discard_stream(stream)


def discard_stream(stream: int) -> None:
    """Points a standard stream to /dev/null, by its number."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, stream)
    os.close(null)


def child_environment() -> dict[str, str]:
    """This process's variables, for a child that runs ``python -m`` with a module of this code.

    Python finds this code first, and takes no file of the working directory, such as ``tasks.py``, for it.
    """
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
