"""The order in which a worker looks at its queues: lanes get equal time, however long their tasks take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import Lock
from time import monotonic


@dataclass
class _Lane:
    """A lane's clock without its running tasks, and when each of them began."""

    served_until_s: float = 0.0
    running: dict[str, float] = field(default_factory=dict)

    def reached(self, now: float) -> float:
        """Where its clock stands."""
        return self.served_until_s + sum(now - since for since in self.running.values())


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
        self._lanes: defaultdict[str, _Lane] = defaultdict(_Lane)
        self._lane_of: dict[str, str] = {}
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
            name, now = _lane(queue), self._clock()
            lane, reached = self._lanes[name], self._reached(name, now)
            lane.served_until_s += reached - lane.reached(now)
            lane.running[task], self._lane_of[task] = now, name
            self._virtual_s = reached

    def end(self, task: str) -> None:
        """A task that was taken has ended; others are ignored."""
        with self._lock:
            if (name := self._lane_of.pop(task, None)) is not None:
                lane = self._lanes[name]
                lane.served_until_s += self._clock() - lane.running.pop(task)

    def _reached(self, name: str, now: float) -> float:
        return max(self._lanes[name].reached(now), self._virtual_s)


def _lane(queue: str) -> str:
    return queue.rpartition(".")[2]
