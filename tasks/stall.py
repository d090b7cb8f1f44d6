"""Notices that a worker stands still: every thread of its pool runs one task for longer than any may."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from time import monotonic

from hetrain.public.protocol import keys

logger = logging.getLogger(__name__)

STALLED = os.EX_TEMPFAIL
"""The exit status of a worker that has stood still. A supervisor starts it again."""
_SILENCE_S = 600
_LAST_TASKS_S = int(max(keys.PREPARE_LIMIT_S, keys.RUN_LIMIT_S))
_STDERR = 2  # Celery replaces sys.stderr by its log


class RunningTasks:
    """Until when each running task should have ended. Thread-safe."""

    def __init__(self) -> None:
        self._ends: dict[object, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def noted(self, limit_s: float) -> Iterator[None]:
        """Notes a task for the length of a block, which should take `limit_s` seconds at most."""
        task = object()
        with self._lock:
            self._ends[task] = monotonic() + limit_s
        try:
            yield
        finally:
            with self._lock:
                del self._ends[task]

    def ends(self) -> list[float]:
        """On the monotonic clock."""
        with self._lock:
            return list(self._ends.values())


running_tasks = RunningTasks()
"""Of this process."""


def stands_still(ends: Collection[float], slots: int, now: float) -> bool:
    """Whether all `slots` threads of a pool run tasks that should have ended at `ends`, before `now`."""
    return len(ends) >= slots and all(end < now for end in ends)


def expect_signs() -> None:
    """Ends the process unless this is called again within 10 minutes, even while no thread can run."""
    faulthandler.dump_traceback_later(_SILENCE_S, exit=True, file=_STDERR)


def expect_end() -> None:
    """Ends the process unless it ends by itself before its last tasks' clients give up: no sign comes now."""
    faulthandler.dump_traceback_later(_LAST_TASKS_S, exit=True, file=_STDERR)


def end_stalled_process() -> None:
    """Ends the process at once, with its stacks in the log: its threads cannot be ended."""
    logger.critical("no task of this worker ends, while others wait: the worker ends, to be started again")
    faulthandler.dump_traceback(all_threads=True, file=_STDERR)
    os._exit(STALLED)
