"""The order in which a worker looks at its queues: lanes get equal time, however long their tasks take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from threading import Lock
from time import monotonic


class FairOrder:
    """Start-time fair queueing over lanes, with costs that are known at a task's end.

    A lane's clock stands at max(its clock, V) when a task of it is taken, V being where the last such clock
    stood, and goes on by the seconds that the task takes. The lane whose clock is behind comes first; among
    equals, the queue that was used longest ago. Of two lanes that have tasks waiting, one is ahead of the
    other by at most one task of each, times the tasks that the worker runs at once. A lane that was idle
    saves nothing up. Source: Goyal, Vin, Cheng, "Start-time fair queueing", SIGCOMM 1996, theorem 1.

    A lane is the last part of a queue's name, so that it has one share for all models. The methods are those
    of kombu's queue cycles (`kombu.utils.scheduling.round_robin_cycle`). Any thread may call them.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._queues: list[str] = []
        self._clocks: defaultdict[str, float] = defaultdict(float)  # of lanes, without their running tasks
        self._running: dict[str, tuple[str, float]] = {}  # the lane of each task, and when it was taken
        self._virtual_s = 0.0
        self._lock = Lock()

    def update(self, queues: Iterable[str]) -> None:
        """Replaces the queues."""
        wanted = list(queues)
        with self._lock:
            kept = [queue for queue in self._queues if queue in wanted]
            self._queues = kept + [queue for queue in wanted if queue not in kept]

    def consume(self, n: int) -> list[str]:
        """The first `n` queues, in the order in which tasks are to be taken."""
        with self._lock:
            now = self._clock()
            return sorted(self._queues, key=lambda queue: self._reached(_lane(queue), now))[:n]

    def rotate(self, last_used: str) -> str:
        """Puts a queue behind its equals. Returns it."""
        with self._lock:
            if last_used in self._queues:
                self._queues.remove(last_used)
                self._queues.append(last_used)
        return last_used

    def begin(self, queue: str, task: str) -> None:
        """A task was taken from a queue."""
        with self._lock:
            lane, now = _lane(queue), self._clock()
            self._virtual_s = self._reached(lane, now)
            self._clocks[lane] += self._virtual_s - self._own_clock(lane, now)
            self._running[task] = lane, now

    def end(self, task: str) -> None:
        """A task that was taken has ended; others are ignored."""
        with self._lock:
            if (found := self._running.pop(task, None)) is not None:
                lane, since = found
                self._clocks[lane] += self._clock() - since

    def _reached(self, lane: str, now: float) -> float:
        return max(self._own_clock(lane, now), self._virtual_s)

    def _own_clock(self, lane: str, now: float) -> float:
        return self._clocks[lane] + sum(now - since for own, since in self._running.values() if own == lane)


def _lane(queue: str) -> str:
    return queue.rpartition(".")[2]
