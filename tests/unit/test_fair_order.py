"""Lanes get equal time of a worker, whatever their tasks cost and however many wait."""

from __future__ import annotations

import heapq
from collections import defaultdict
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.intake.fair_order import FairOrder

QUEUES = ("gpu", "gpu.aa.0", "gpu.bb.0", "gpu.aa.1", "gpu.bb.1", "gpu.aa.2")


class Worker:
    """A worker with `slots` threads, in simulated seconds. `waiting` has what each queue's tasks cost."""

    def __init__(self, slots: int, waiting: dict[str, list[float]]) -> None:
        self.now = 0.0
        self.taken: list[tuple[str, float]] = []
        self.used: defaultdict[str, float] = defaultdict(float)
        self.waiting = waiting
        self._order, self._slots = FairOrder(lambda: self.now), slots
        self._order.update(QUEUES)
        self._running: list[tuple[float, str]] = []

    def run_until(self, end: float) -> None:
        """Takes tasks as long as some wait, up to a time; those that run then go on."""
        while self.now < end:
            while len(self._running) < self._slots and self._take():
                pass
            if not self._running:
                return
            self.now, task = heapq.heappop(self._running)
            self._order.end(task)

    def _take(self) -> bool:
        queue = next((each for each in self._order.consume(len(QUEUES)) if self.waiting.get(each)), None)
        if queue is None:
            return False
        cost, task = self.waiting[queue].pop(), f"{len(self.taken)}"
        self._order.rotate(queue)
        self._order.begin(queue, task)
        heapq.heappush(self._running, (self.now + cost, task))
        self.taken.append((queue, cost))
        self.used[queue.rpartition(".")[2]] += cost
        return True


costs = st.floats(0.01, 10.0, allow_nan=False)


@given(slots=st.integers(1, 3), sizes=st.lists(costs, min_size=4, max_size=4), seed=st.integers(0, 99))
def test_lanes_that_have_tasks_get_equal_time(slots: int, sizes: list[float], seed: int) -> None:
    chance = Random(seed)
    queues = ["gpu.aa.0", "gpu.aa.1", "gpu.bb.1", "gpu.aa.2"]
    # Each queue's tasks are of one size or of two.
    drawn = {queue: chance.sample(sizes, chance.randint(1, 2)) for queue in queues}
    worker = Worker(slots, {queue: [chance.choice(drawn[queue]) for _ in range(5000)] for queue in queues})
    worker.run_until(100 * min(sizes))
    assert all(worker.waiting.values())
    assert max(worker.used.values()) - min(worker.used.values()) <= 2 * slots * max(sizes)


def test_a_lane_with_small_tasks_is_not_held_up_by_one_with_large_ones() -> None:
    worker = Worker(1, {"gpu.aa.0": [10.0] * 60, "gpu.aa.1": [1.0] * 25})
    worker.run_until(40.0)
    assert [cost for _, cost in worker.taken] == [10.0, *[1.0] * 10, 10.0, *[1.0] * 10]


def test_a_lane_saves_nothing_up_while_it_is_idle() -> None:
    worker = Worker(1, {"gpu.aa.0": [1.0] * 100})
    worker.run_until(50.0)
    worker.waiting["gpu.aa.1"] = [1.0] * 50
    worker.run_until(70.0)
    late = [queue for queue, _ in worker.taken[50:]]
    assert late.count("gpu.aa.1") == pytest.approx(10, abs=1)


def test_two_models_of_a_lane_have_one_share_and_its_queues_take_turns() -> None:
    worker = Worker(1, {queue: [1.0] * 40 for queue in ("gpu.aa.0", "gpu.bb.0", "gpu.aa.1")})
    worker.run_until(40.0)
    assert worker.used["0"] == pytest.approx(20, abs=1)
    taken = [queue for queue, _ in worker.taken]
    assert abs(taken.count("gpu.aa.0") - taken.count("gpu.bb.0")) <= 1


def test_the_end_of_a_task_that_is_not_known_changes_nothing() -> None:
    order = FairOrder(lambda: 1.0)
    order.update(QUEUES)
    order.end("never begun")
    assert order.consume(2) == list(QUEUES[:2])
    assert order.rotate("elsewhere") == "elsewhere"
