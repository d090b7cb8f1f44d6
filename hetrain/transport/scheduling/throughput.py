"""How fast each worker is, measured by what it has done for this job."""

from __future__ import annotations

import threading

from hetrain.public.protocol.messages import EvaluateTask
from hetrain.public.protocol.registration import MAX_WORKERS

_WEIGHT = 0.2
_SHORTEST_S, _LONGEST_S = 1e-6, 1e6


def work_of(task: EvaluateTask) -> int:
    """Work of a task: result rows times bytes of the operand, so about rows·K·tokens in every engine."""
    return (task.stop - task.start) * task.input.nbytes


class Throughput:
    """Work per second of each worker, as moving averages. Thread-safe."""

    def __init__(self) -> None:
        self._rates: dict[str, float] = {}
        self._lock = threading.Lock()

    def note(self, worker: str, work: int, seconds: float) -> None:
        """Takes one measurement: `worker` did `work` in `seconds`, as it says."""
        if not _SHORTEST_S < seconds < _LONGEST_S:
            return
        rate = work / seconds
        with self._lock:
            if worker not in self._rates and len(self._rates) >= MAX_WORKERS:
                self._rates.clear()  # names come from outside
            before = self._rates.get(worker, rate)
            self._rates[worker] = before + _WEIGHT * (rate - before)

    def of(self, worker: str) -> float | None:
        """The rate of `worker`, None before its first result."""
        with self._lock:
            return self._rates.get(worker)
