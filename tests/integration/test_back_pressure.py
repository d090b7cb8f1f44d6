"""Back pressure of a real job: how much of it lies in the broker."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from hetrain.config import OutsourcingConfig
from hetrain.public.broker.connection import client, connection_pool
from hetrain.public.errors import Interrupted
from hetrain.public.protocol.product import Operand, Product
from hetrain.train.session import open_base, open_session
from hetrain.transport.celery_channel import CeleryChannel
from tasks.supervisor.server import start_worker, stop
from tests.harness.processes import broker_server
from tests.harness.waiting import eventually


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
        budget = channel.budget
        stack.callback(os.kill, worker.pid, signal.SIGCONT)
        os.kill(worker.pid, signal.SIGSTOP)

        def one(_: int) -> None:
            channel.multiply(product, operand)

        operand = Operand({}, [memoryview(bytes(100_000))], 64 * 10_000)
        pool = stack.enter_context(ThreadPoolExecutor(6))
        jobs = [pool.submit(one, number) for number in range(6)]
        broker = client(connection_pool(served.url, max_connections=1))

        def operands() -> int:
            return sum(1 for _ in broker.scan_iter("hetrain:*:in:*"))

        def all_wait() -> bool:
            assert not any(job.done() for job in jobs)
            return operands() >= 2 and budget.n_waiting >= 4

        eventually(all_wait)
        assert operands() == 2
        channel.close()
        for job in jobs:
            with pytest.raises(Interrupted):
                job.result(60)
        assert operands() == 0
        assert budget.held == ()
