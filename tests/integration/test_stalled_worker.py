"""A worker whose tasks do not end: it says so, leaves, and is started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from contextlib import closing
from pathlib import Path
from time import sleep

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetrain.public.protocol.keys import PREPARE_LIMIT_S
from hetrain.public.protocol.registration import REGISTRY_KEY
from hetrain.transport.celery_channel import CeleryChannel
from tasks.stall import STALLED, stands_still
from tasks.supervisor.server import stop
from tasks.supervisor.worker_process import SupervisedWorker
from tests.harness.engine import EngineHarness
from tests.harness.in_flight import InFlight, broker_client, within_guard
from tests.harness.processes import broker_server
from tests.harness.waiting import eventually

# Its first evaluation never ends: it waits in a lock, as a kernel or a driver would.
STALLS_ONCE = """
    import os, threading
    from pathlib import Path
    from worker_gpu.service import Service
    from tasks.app import app

    honest, marker = Service.evaluate, Path({marker!r})

    def evaluate(service, task, load_plan, payload):
        if not marker.exists():
            marker.touch()
            threading.Event().wait()
        return honest(service, task, load_plan, payload)

    Service.evaluate = evaluate
    app.start(["worker", "-Q", "gpu", "-n", "stalls@host"])
"""


def test_a_worker_that_stands_still_leaves_and_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_flight = InFlight(monkeypatch)
    harness = EngineHarness("clear", {"w": torch.randn(64, 32)}, tmp_path / "tiny")
    marker = tmp_path / "stalled"
    ended = threading.Event()
    with broker_server() as served, broker_client(served.url) as client:
        settings = {
            "HETRAIN_BROKER_URL": served.url,
            "HETRAIN_MODELS": json.dumps([str(tmp_path / "tiny")]),
            "HETRAIN_STALL_S": "1",
            "OMP_NUM_THREADS": "1",
        }

        def start(ready: int) -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(STALLS_ONCE.format(marker=str(marker)))],
                env=os.environ | settings | {"HETRAIN_READY_FD": str(ready)},
                stdout=served.log,
                stderr=served.log,
                pass_fds=(ready,),
                start_new_session=True,
            )

        worker = SupervisedWorker(start, persistent=True)

        def supervise() -> None:
            while not ended.is_set():
                worker.ensure_running()
                sleep(0.05)

        supervisor = threading.Thread(target=supervise)
        supervisor.start()
        try:
            eventually(lambda: client.zcard(REGISTRY_KEY) == 1)
            with closing(CeleryChannel(served.url)) as channel:
                plan = harness.plan
                within_guard(lambda: channel.prepare(plan.model, "clear", plan.to_bytes(), plan.digest))
                product = harness.product("w", "forward")
                x = torch.randn(5, 32)
                sealed = [harness.sealer.seal(x, product) for _ in range(2)]
                pending = [
                    in_flight.start(channel, product, each.operand, accept=each.opening.check)
                    for each in sealed
                ]
                eventually(lambda: worker.status == STALLED)
                assert client.zcard(REGISTRY_KEY) == 0
                within_guard(lambda: [each.result() for each in pending])
                for each in sealed:
                    assert torch.equal(each.opening.open(), harness.multiply("w", "forward", x))
        finally:
            ended.set()
            supervisor.join()
            stop([worker.process] if worker.process else [], grace_s=0)
        log = (served.directory / "log").read_text()
    assert "no task of this worker ends, while others wait" in log
    assert "in evaluate" in log  # the stack that does not move


# Prints after how many seconds the process would be ended, each time that is put off.
WITHDRAWS = """
    import faulthandler
    faulthandler.dump_traceback_later = lambda seconds, **_: print(seconds)

    from hetrain.public.protocol.registration import WorkerRegistration
    from tasks.app import broker_url
    from tasks.heartbeat import Heartbeat

    heartbeat = Heartbeat(
        broker_url(), WorkerRegistration(worker="w@h", device="cpu", queue="gpu", models=(), concurrency=1)
    )
    heartbeat.start()
    heartbeat.withdraw()
    heartbeat.wait(60)
"""


def test_a_worker_that_is_to_end_has_as_long_as_its_last_task_may_take() -> None:
    with broker_server() as served:
        said = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(WITHDRAWS)],
            env=os.environ | {"HETRAIN_BROKER_URL": served.url},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
    *_, last = map(float, said.split())
    assert last >= PREPARE_LIMIT_S


@given(ends=st.lists(st.integers(0, 20), max_size=6), slots=st.integers(1, 6), now=st.integers(0, 20))
def test_one_thread_that_is_free_or_in_time_keeps_a_worker(ends: list[int], slots: int, now: int) -> None:
    still = stands_still(ends, slots, now)
    assert still == (len([end for end in ends if end < now]) == len(ends) >= slots)
    assert not stands_still([*ends, now], slots, now)
    assert not stands_still(ends, len(ends) + 1, now)
