"""Back pressure: how much of a job lies in the broker."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetrain.public.errors import Interrupted, UsageError
from hetrain.transport.scheduling.flow_control import ByteBudget, share_of
from tests.harness.waiting import eventually


@given(sizes=st.lists(st.integers(1, 150), max_size=12))
def test_a_budget_is_never_overdrawn_and_serves_in_order(sizes: list[int]) -> None:
    budget = ByteBudget(100, strict=False)
    served: list[int] = []
    held: list[int] = []
    guard = threading.Lock()

    def one(number: int) -> None:
        budget.acquire(sizes[number])
        with guard:
            served.append(number)
            held.append(sizes[number])
            assert sum(held) <= 100 or len(held) == 1
        with guard:
            held.remove(sizes[number])
        budget.release(sizes[number])

    budget.acquire(100)
    with ThreadPoolExecutor(max(len(sizes), 1)) as pool:
        jobs = []
        for number in range(len(sizes)):
            jobs.append(pool.submit(one, number))
            # lined up, one after the other
            eventually(lambda number=number: budget.n_waiting > number, interval_s=0)  # type: ignore[misc]
        budget.release(100)
        for job in jobs:
            job.result(60)
    budget.acquire(100)  # all was given back
    assert sorted(served) == list(range(len(sizes)))
    if all(size > 50 for size in sizes):
        assert served == list(range(len(sizes)))


def test_a_budget_refuses_or_ends_but_never_hangs() -> None:
    with pytest.raises(UsageError, match="max_bytes_in_flight"):
        ByteBudget(100, strict=True).acquire(101)
    budget = ByteBudget(100, strict=True)
    with budget.reserved(90), ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(budget.acquire, 50) for _ in range(2)]
        eventually(lambda: budget.n_waiting == 2)
        budget.close(Interrupted("closed"))
        for job in waiting:
            with pytest.raises(Interrupted):
                job.result(60)
    assert budget.held == ()
    with pytest.raises(Interrupted):
        budget.acquire(1)
    assert (share_of(None), share_of(0), share_of(1000)) == (1 << 30, 1 << 30, 500)
