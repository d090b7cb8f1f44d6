"""Back pressure: how much of a job lies in the broker."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from time import sleep

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetrain.config import OutsourcingConfig
from hetrain.public.broker.connection import client, connection_pool
from hetrain.public.errors import Interrupted, UsageError
from hetrain.public.protocol.product import Operand, Product
from hetrain.train.session import open_base, open_session
from hetrain.transport.celery_channel import CeleryChannel
from hetrain.transport.scheduling.flow_control import ByteBudget, FlowControl, share_of
from tasks.supervisor.server import start_worker, stop
from tests.harness.processes import broker_server as broker_server


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
            while budget.n_waiting <= number:  # lined up, one after the other
                pass
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
    pressure = FlowControl(budget)
    with pressure.reserved(("g", "forward"), 90, 0) as learn_size, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(budget.acquire, 50) for _ in range(2)]
        while budget.n_waiting < 2:
            pass
        budget.close(Interrupted("closed"))
        for job in waiting:
            with pytest.raises(Interrupted):
                job.result(60)
        learn_size(10)
    assert budget.held == ()
    with pytest.raises(Interrupted):
        budget.acquire(1)
    assert (share_of(None), share_of(0), share_of(1000)) == (1 << 30, 1 << 30, 500)


def test_results_are_expected_as_they_last_came() -> None:
    budget = ByteBudget(1 << 30, strict=True)
    pressure = FlowControl(budget)
    with pressure.reserved(("g", "forward"), 100, 7 * 2048 * 5) as learn_size:
        assert budget.held == (100 + 7 * 2048 * 5,)
        learn_size(40)
    with pressure.reserved(("g", "forward"), 100, 7 * 2048 * 5):
        assert budget.held == (140,)


def test_no_more_lies_in_the_broker_than_may(tiny_llama: Path) -> None:
    """Six threads send to a worker that does not move, with room for two of their products."""
    with broker_server() as served, ExitStack() as stack:
        worker = start_worker(1, served.url, str(tiny_llama), served.log)
        stack.callback(stop, [worker])
        session = stack.enter_context(
            open_session(
                open_base(str(tiny_llama)),
                OutsourcingConfig(engine="clear"),
                served.url,
                "cpu",
                max_bytes_in_flight=2 * (100_000 + 64 * 10_000) + 1000,
            )
        )
        channel, product = session.channel, Product(session.split.plan.groups[0], "forward")
        assert isinstance(channel, CeleryChannel)
        budget = channel.flow_control.budget
        stack.callback(os.kill, worker.pid, signal.SIGCONT)
        os.kill(worker.pid, signal.SIGSTOP)

        def one(_: int) -> None:
            channel.multiply(product, operand)

        operand = Operand({}, [memoryview(bytes(100_000))], 64 * 10_000 // product.n)
        pool = stack.enter_context(ThreadPoolExecutor(6))
        jobs = [pool.submit(one, number) for number in range(6)]
        broker = client(connection_pool(served.url, max_connections=1))

        def operands() -> int:
            return sum(1 for _ in broker.scan_iter("hetrain:*:in:*"))

        while operands() < 2 or budget.n_waiting < 4:
            assert not any(job.done() for job in jobs)
            sleep(0.01)
        assert operands() == 2
        channel.close()
        for job in jobs:
            with pytest.raises(Interrupted):
                job.result(60)
        assert operands() == 0
        assert budget.held == ()
