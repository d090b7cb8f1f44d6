"""A broker that is out of memory: real broker, a real worker that nobody restarts, the `clear` engine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from time import sleep

import numpy as np
import pytest

from hetrain.public.broker.blobs import BlobStore
from hetrain.public.errors import BrokerFull
from hetrain.public.protocol import keys
from hetrain.public.protocol.messages import Completion, new_token
from hetrain.public.protocol.plan import Plan
from hetrain.transport.celery_channel import CeleryChannel
from hetrain.transport.requests.request import Timeouts
from tasks.leases import Leases
from tasks.request_log import RequestLog
from tasks.supervisor.server import DEFAULT_MAXMEMORY, private_directory, start_server, start_worker, stop
from tests.harness.in_flight import GUARD_S, broker_client, has_lease, keys_of, within_guard
from tests.harness.one_matrix import IN, Send, exact, operand, values
from tests.harness.waiting import eventually

Lone = tuple[str, subprocess.Popen[bytes]]


@pytest.fixture(scope="module")
def lone(model: Path) -> Iterator[Lone]:
    """A broker's URL, and its only worker, which nobody restarts."""
    directory = private_directory()
    with open(directory / "log", "wb") as log:
        server, url = start_server(directory, log)
        worker = start_worker(1, url, str(model), log)
        try:
            yield url, worker
        finally:
            stop([worker])
            stop([server])
            shutil.rmtree(directory)


@contextmanager
def full(url: str) -> Iterator[None]:
    """For the length of a block, the broker holds more than it may: it refuses even a byte.

    Filling it up would not do: there is room again as soon as the server shrinks a client's buffers.
    """
    store = BlobStore(url)
    with closing(store):
        store.client.config_set("maxmemory", 1)
        try:
            yield
        finally:
            store.client.config_set("maxmemory", DEFAULT_MAXMEMORY)


IMPATIENT = Timeouts(full_s=1)


def test_a_job_does_not_start_on_a_full_broker(lone: Lone, plan: Plan) -> None:
    url, _ = lone
    with full(url), pytest.raises(BrokerFull):
        within_guard(lambda: CeleryChannel(url, timeouts=IMPATIENT))
    channel = CeleryChannel(url, timeouts=IMPATIENT)
    with full(url):
        with pytest.raises(BrokerFull, match="maxmemory") as caught:
            within_guard(lambda: channel.prepare("tiny", "clear", plan.to_bytes(), plan.digest))
        assert caught.value.exit_code == 7
        assert keys_of(channel, url)
        within_guard(channel.close)
        assert not keys_of(channel, url)


@pytest.mark.parametrize("busy", [True, False])
def test_a_broker_that_fills_up_ends_the_job_and_nothing_else(
    lone: Lone, plan: Plan, matrix: np.ndarray, busy: bool, send: Send
) -> None:
    url, worker = lone
    channel = CeleryChannel(url, timeouts=IMPATIENT)
    channel.prepare("tiny", "clear", plan.to_bytes(), plan.digest)
    if not busy:
        os.kill(worker.pid, signal.SIGSTOP)
    pending = [send(channel, operand(IN, 4096)) for _ in range(4)]
    with broker_client(url) as client:
        eventually(lambda: has_lease(client, channel) or not busy)
    with full(url):
        os.kill(worker.pid, signal.SIGCONT)
        with pytest.raises(BrokerFull, match="maxmemory"):
            within_guard(lambda: [each.result() for each in pending])
        within_guard(channel.close)
        assert not keys_of(channel, url)
    with closing(CeleryChannel(url)) as another:
        within_guard(lambda: another.prepare("tiny", "clear", plan.to_bytes(), plan.digest))
        reply = within_guard(send(another, x := operand(IN, 3)).result)
    assert (values(reply, 3) == exact(matrix, x)).all()
    assert worker.poll() is None


@pytest.mark.parametrize("busy", [True, False])
def test_a_broker_that_is_full_for_a_while_is_waited_for(
    lone: Lone, plan: Plan, matrix: np.ndarray, busy: bool, send: Send
) -> None:
    url, worker = lone
    # Only the end of the shortage, and no other wait, may bring back what the worker loses meanwhile.
    timeouts = Timeouts(full_s=GUARD_S, no_worker_s=10 * GUARD_S, deadline_s=10 * GUARD_S)
    with closing(CeleryChannel(url, timeouts=timeouts)) as channel:
        channel.prepare("tiny", "clear", plan.to_bytes(), plan.digest)
        if not busy:
            os.kill(worker.pid, signal.SIGSTOP)
        x = operand(IN, 4096)
        pending = [send(channel, x) for _ in range(4)]
        with broker_client(url) as client:
            eventually(lambda: has_lease(client, channel) or not busy)
        with full(url):
            os.kill(worker.pid, signal.SIGCONT)
            sleep(2)
        replies = within_guard(lambda: [each.result() for each in pending])
    expected = exact(matrix, x)
    assert all((values(reply, 4096) == expected).all() for reply in replies)
    assert worker.poll() is None


def test_a_worker_that_waits_to_report_is_not_taken_for_dead(lone: Lone) -> None:
    url, _ = lone
    job, done = new_token(), Completion(request=new_token(), state="done", worker="w")
    lease = keys.lease(job, done.request)
    with closing(BlobStore(url)) as store, ThreadPoolExecutor(1) as pool:
        log = RequestLog(url, store, "w")
        store.client.set(keys.alive(job), "", ex=GUARD_S)
        assert log.begin(job, done.model_copy(update={"state": "started"})) == 1
        store.client.delete(keys.done_list(job))
        with Leases(store.client, "w").renewed(lease) as end_lease, full(url):
            end_lease()
            report = pool.submit(log.end, job, done)
            sleep(keys.LEASE_TTL_MS / 1000 + 1)
            assert store.client.exists(lease)
        report.result()
        assert not store.client.exists(lease)
        assert store.client.lpop(keys.done_list(job)) == done.to_json().encode()
