"""The client's side of a fleet: registered workers, routing, partition, rejected results, all real."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from time import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetrain.nn.remote import ProductStats, RemoteMatmul
from hetrain.public.broker.blobs import BlobStore
from hetrain.public.errors import NoWorker, ResultRejected
from hetrain.public.protocol.messages import VERSION
from hetrain.public.protocol.registration import REGISTRATION_TTL_S, REGISTRY_KEY, WorkerRegistration
from hetrain.secret.engines.concrete import ConcreteSealer
from hetrain.secret.engines.rlwe.hints import HintStore
from hetrain.train.hints import ignore_progress, make_hints
from hetrain.transport.celery_channel import CeleryChannel
from hetrain.transport.requests.job_connection import JobConnection
from hetrain.transport.requests.request import Timeouts
from hetrain.transport.requests.sender import Sender
from hetrain.transport.requests.state import Reason
from hetrain.transport.scheduling import partition as partition_module
from hetrain.transport.scheduling.partition import MAX_PIECES, MIN_ROWS, count_pieces, partition
from hetrain.transport.scheduling.registry import WorkerRegistry
from tasks.supervisor.server import stop
from tasks.supervisor.worker_process import spawn_worker
from tests.harness.engine import EngineHarness, open_checked
from tests.harness.in_flight import GUARD_S, InFlight, broker_client, lane, within_guard
from tests.harness.processes import BrokerServer, broker_server
from tests.harness.waiting import eventually

ROWS, K = 640, 96
NAMES = ("w0", "w1", "w2", "w3")
# Only what a test is about may bring a request back.
PATIENT = Timeouts(no_worker_s=10 * GUARD_S, deadline_s=10 * GUARD_S)


@dataclass
class Stage:
    """A broker, a model's directory, and the workers that a test has started, by name."""

    served: BrokerServer
    model: Path
    workers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *, model: Path | None = None, shards: str = "", script: str = "") -> None:
        """Starts a worker; one that runs `script` instead of Celery's command must start the app itself."""
        settings = {
            "HETRAIN_BROKER_URL": self.served.url,
            "HETRAIN_MODELS": json.dumps([str(model or self.model)]),
            "HETRAIN_SHARDS": shards,
            "OMP_NUM_THREADS": "1",
        }
        if not script:
            self.workers[name] = spawn_worker(name, settings, self.served.log)
            return
        self.workers[name] = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)],
            env=os.environ | settings,
            stdout=self.served.log,
            stderr=self.served.log,
            start_new_session=True,
        )

    def await_cards(self, count: int) -> None:
        with broker_client(self.served.url) as client:
            assert eventually(lambda: client.zcard(REGISTRY_KEY) == count)

    def send(self, signum: signal.Signals, *names: str) -> None:
        for name in names:
            os.kill(self.workers[name].pid, signum)

    def open(self, harness: EngineHarness, timeouts: Timeouts = PATIENT) -> CeleryChannel:
        channel = CeleryChannel(self.served.url, timeouts=timeouts)
        plan, engine = harness.plan, harness.name
        try:
            within_guard(
                lambda: channel.prepare(
                    plan.model, engine, plan.to_bytes(), plan.digest, harness.sealer.setup
                )
            )
        except BaseException:
            channel.close()
            raise
        return channel


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with broker_server() as served:
        made = Stage(served, tmp_path / "tiny")
        try:
            yield made
        finally:
            for worker in made.workers.values():
                os.kill(worker.pid, signal.SIGCONT)
            stop(list(made.workers.values()), grace_s=0)


def harness_of(stage: Stage, engine: str) -> EngineHarness:
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(ROWS, K, generator=generator) for name in NAMES}
    return EngineHarness(engine, weights, stage.model)


@pytest.fixture
def in_flight(monkeypatch: pytest.MonkeyPatch) -> InFlight:
    return InFlight(monkeypatch)


def seen(channel: CeleryChannel) -> dict[str, str]:
    """Name before the @ and queue of each worker that the channel sees."""
    return {each.worker.partition("@")[0]: each.queue for each in channel.workers}


class Asked:
    """x·Wᵀ, sent in one piece."""

    def __init__(
        self, in_flight: InFlight, harness: EngineHarness, channel: CeleryChannel, name: str, x: torch.Tensor
    ) -> None:
        product = harness.product(name, "forward")
        self._sealed = harness.sealer.seal(x, product)
        check = self._sealed.opening.check
        self._reply = in_flight.start(channel, product, self._sealed.operand, pieces=1, accept=check)
        self.request, self.queue = in_flight.sent[-1]

    def answer(self) -> torch.Tensor:
        """Waits for it."""
        self._reply.result(GUARD_S)
        return self._sealed.opening.open()


def test_two_workers_share_every_product_and_nothing_changes(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition_module, "MIN_PIECE_S", 1e-9)  # these products are tiny
    clear = harness_of(stage, "clear")
    stage.start("a")
    stage.start("b")
    stage.await_cards(2)
    with closing(stage.open(clear)) as channel:
        product = clear.product("w0", "forward")
        reply = channel.multiply(product, clear.sealer.seal(torch.randn(256, K), product).operand)
        assert [part.rows for part in reply.parts] == [(0, 320), (320, 640)]
        remote = RemoteMatmul(channel, clear.sealer, ProductStats())
        local = RemoteMatmul(clear.channel, clear.sealer, ProductStats())
        rounds, workers = 0, {part.worker for part in reply.parts}
        while rounds < 4 or workers != {each.worker for each in channel.workers}:
            rounds += 1
            assert rounds < 200
            for direction, k in (("forward", K), ("backward", ROWS)):
                x, product = torch.randn(100, k), clear.product(NAMES[rounds % 4], direction)  # type: ignore[arg-type]
                assert torch.equal(remote.multiply(product, x), local.multiply(product, x))
                reply = channel.multiply(product, clear.sealer.seal(x, product).operand)
                workers |= {part.worker for part in reply.parts}
        assert len(workers) == 2
        name = f"hetrain:{channel.job}:*"
    with broker_client(stage.served.url) as client:
        assert not client.keys(name)

    # Hints from several workers are those of one; products from several threads, whose cuts differ.
    rlwe = harness_of(stage, "rlwe")
    with closing(stage.open(rlwe)) as channel, ThreadPoolExecutor(4) as pool:
        shared = HintStore(rlwe.hints.directory.parent / "shared")
        (shared.directory / "seed").write_bytes((rlwe.hints.directory / "seed").read_bytes())
        shared = HintStore(shared.directory)
        within_guard(lambda: make_hints(shared, rlwe.plan, channel, rlwe.weights, ignore_progress))
        for path in rlwe.hints.directory.glob("*.hint"):
            assert (shared.directory / path.name).read_bytes() == path.read_bytes()
        remote = RemoteMatmul(channel, rlwe.sealer, ProductStats())

        def work(index: int) -> bool:
            x, product = torch.randn(20, K), rlwe.product(NAMES[index % 4], "forward")
            y = remote.multiply(product, x)
            return bool(rlwe.excess(*product.key, x, y).any())

        assert not any(within_guard(lambda: list(pool.map(work, range(16)))))


def test_requests_follow_the_shards_and_leave_dead_workers(stage: Stage, in_flight: InFlight) -> None:
    harness = harness_of(stage, "clear")
    stage.start("first", shards="0/2")
    stage.await_cards(1)
    x = torch.randn(5, K)
    with pytest.raises(NoWorker, match=r"2 of the 4 groups of tiny: w2, w3 \(shards 1-1/2\)") as error:
        stage.open(harness, Timeouts(no_worker_s=2))
    assert "HETRAIN_SHARDS=1-1/2" in error.value.hint
    stage.start("last", shards="1/2")
    stage.start("whole")
    stage.await_cards(3)
    with closing(stage.open(harness)) as channel:
        assert eventually(
            lambda: seen(channel) == {"first": "gpu.0-0of2", "last": "gpu.1-1of2", "whole": "gpu"}
        )
        stage.send(signal.SIGSTOP, *stage.workers)
        asked = {name: [Asked(in_flight, harness, channel, name, x) for _ in range(4)] for name in NAMES}
        queues = {name: sorted(each.queue for each in several) for name, several in asked.items()}
        whole, first, last = (lane(queue, channel) for queue in ("gpu", "gpu.0-0of2", "gpu.1-1of2"))
        assert queues["w0"] == queues["w1"] == sorted([whole, whole, first, first])
        assert queues["w2"] == [last] * 4
        assert queues["w3"] == sorted([whole, whole, last, last])
        stage.send(signal.SIGKILL, "last")
        stage.send(signal.SIGCONT, "first", "whole")
        for name, several in asked.items():
            expected = harness.multiply(name, "forward", x)
            assert all(torch.equal(each.answer(), expected) for each in several)
    # The last one that serves w2 goes: what waits for it is given up, what does not goes on.
    with closing(stage.open(harness, Timeouts(no_worker_s=2))) as channel:
        stage.send(signal.SIGTERM, "whole")  # it withdraws its registration
        assert eventually(lambda: seen(channel) == {"first": "gpu.0-0of2"})
        given_up = Asked(in_flight, harness, channel, "w2", x)
        served = Asked(in_flight, harness, channel, "w1", x)
        assert torch.equal(served.answer(), harness.multiply("w1", "forward", x))
        with pytest.raises(NoWorker, match="shards 1-1/2"):
            given_up.answer()


def test_a_worker_of_another_model_gets_no_task_of_the_job(
    stage: Stage, tmp_path: Path, in_flight: InFlight, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hetrain.transport.requests.recovery")
    harness = harness_of(stage, "clear")
    other = EngineHarness("clear", {"v": torch.randn(3, 3)}, tmp_path / "other")
    stage.start("own")
    stage.start("stranger", model=tmp_path / "other")
    stage.await_cards(2)
    with closing(stage.open(harness)) as channel:
        stage.send(signal.SIGSTOP, "own")
        x = torch.randn(5, K)
        asked = [Asked(in_flight, harness, channel, "w0", x) for _ in range(3)]
        with closing(stage.open(other)):
            pass  # what the stranger serves is served meanwhile
        stage.send(signal.SIGCONT, "own")
        expected = harness.multiply("w0", "forward", x)
        assert all(torch.equal(each.answer(), expected) for each in asked)
    assert Reason.REFUSED.value not in caplog.text


LIAR = """
    import sys, torch
    from worker_gpu.service import Service
    from tasks.app import app

    honest = Service.evaluate

    def evaluate(service, task, load_plan, payload):
        parts = [bytearray(part) for part in honest(service, task, load_plan, payload)]
        for part in parts:
            for index in range(0, len(part), 7):
                part[index] ^= 0x40
        return [memoryview(part) for part in parts]

    Service.evaluate = evaluate
    app.start(["worker", "-Q", "gpu", "--without-gossip", "--without-mingle", "-n", "liar@host"])
"""


def test_a_wrong_result_names_its_worker_and_is_computed_by_another(
    stage: Stage, in_flight: InFlight, caplog: pytest.LogCaptureFixture
) -> None:
    harness = harness_of(stage, "clear")
    stage.start("liar", script=LIAR)
    stage.await_cards(1)
    product, x = harness.product("w0", "forward"), torch.randn(5, K)
    expected = harness.multiply("w0", "forward", x)

    with closing(stage.open(harness)) as channel:
        sealed = harness.sealer.seal(x, product)
        check = sealed.opening.check
        # No other worker serves it.
        alone = in_flight.start(channel, product, sealed.operand, accept=check)
        with pytest.raises(ResultRejected, match="is wrong; it was not decrypted") as caught:
            alone.result(GUARD_S)
        assert caught.value.workers == ("liar@host",)
        stage.start("honest")
        stage.await_cards(2)
        assert eventually(lambda: len(channel.workers) == 2)
        honest = next(each.worker for each in channel.workers if each.worker != "liar@host")
        for _ in range(8):
            reply = in_flight.start(channel, product, sealed.operand, pieces=2, accept=check).result(GUARD_S)
            assert {part.worker for part in reply.parts} == {honest}
            assert torch.equal(sealed.opening.open(), expected)
        warning = "no result of worker liar@host is accepted any more: the result of w0 forward is wrong"
        assert sum(line.startswith(warning) for line in caplog.messages) == 1
        assert any(in_flight.sends(request) > 1 for request, _ in in_flight.sent)
        assert not [line for line in caplog.messages if honest in line]
    # Both parts are the liar's: the one that was taken before the verdict is computed anew as well.
    with closing(stage.open(harness)) as another:
        stage.send(signal.SIGSTOP, "honest")
        pending = in_flight.start(another, product, sealed.operand, pieces=2, accept=check)
        assert eventually(lambda: sum(line.startswith(warning) for line in caplog.messages) == 2)
        stage.send(signal.SIGCONT, "honest")
        reply = pending.result(GUARD_S)
        assert {part.worker for part in reply.parts} == {honest}
        assert torch.equal(sealed.opening.open(), expected)
    with broker_client(stage.served.url) as client:
        assert not client.keys(f"hetrain:{channel.job}:*")
        assert not client.keys(f"hetrain:{another.job}:*")


GOOD = WorkerRegistration(worker="a@host", device="cpu", queue="gpu", models=("tiny",), concurrency=1)


def test_hostile_cards_are_ignored_and_a_broker_without_cards_is_none(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hetrain.transport.scheduling.registry")
    text = GOOD.model_dump_json()
    soon = time() + REGISTRATION_TTL_S
    changed = [
        {"queue": "unacked"},
        {"queue": "gpu\r\nFLUSHALL"},
        {"version": VERSION + 1},
        {"concurrency": 0},
        {"concurrency": True},
        {"worker": "\x1b[31m"},
        {"shards": "2-1/4"},
        {"models": "tiny"},
        {"more": 1},
    ]
    cards: dict[str | bytes, float] = {
        json.dumps(json.loads(text) | {"worker": f"{i}@host"} | change): soon
        for i, change in enumerate(changed)
    }
    cards |= {"": soon, "{}": soon, b"\xff\xfe": soon, "[" * 9000: soon, text + " " * (1 << 18): soon}
    cards |= {text: soon, GOOD.model_copy(update={"worker": "old@host"}).model_dump_json(): soon - 60}
    cards[GOOD.model_copy(update={"worker": "eternal@host"}).model_dump_json()] = float("inf")
    newer = GOOD.model_copy(update={"worker": "b@host", "queue": "gpu.0-0of2", "shards": "0/2"})
    cards |= {newer.model_copy(update={"queue": "gpu"}).model_dump_json(): soon - 1}
    cards |= {newer.model_dump_json(): soon}
    store = BlobStore(stage.served.url)
    connection = JobConnection(stage.served.url, "0" * 32, store, Sender(stage.served.url), PATIENT)
    watch, broker = WorkerRegistry(connection), store.client
    broker.zadd(REGISTRY_KEY, cards)
    assert watch.refresh() == frozenset()
    assert watch.workers.registrations == (GOOD, newer.model_copy(update={"shards": "0-0/2"}))
    complaints = [record for record in caplog.records if record.levelno == logging.WARNING]
    watch.refresh()
    assert len(complaints) == 14
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 14
    assert [record.getMessage() for record in caplog.records if "joined" in record.getMessage()] == [
        "workers joined: a@host (gpu, cpu), b@host (gpu.0-0of2, cpu); 2 there"
    ]
    broker.zrem(
        REGISTRY_KEY, newer.model_dump_json(), newer.model_copy(update={"queue": "gpu"}).model_dump_json()
    )
    assert {each.queue for each in watch.refresh()} == {"gpu.0-0of2"}
    broker.set(REGISTRY_KEY, "of another type", ex=60)
    caplog.clear()
    assert [watch.refresh(), watch.refresh()] == [{GOOD}, frozenset()]
    assert watch.workers.registrations == ()
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    connection.close()


@given(n_rows=st.integers(1, 5000), pieces=st.integers(1, 300), step=st.integers(1, 1024))
def test_cuts_partition_the_rows(n_rows: int, pieces: int, step: int) -> None:
    rows = partition(n_rows, pieces, step)
    assert rows[0][0] == 0
    assert rows[-1][1] == n_rows
    assert all(stop == start for (_, stop), (start, _) in pairwise(rows))
    assert len(rows) <= pieces
    assert all(stop - start >= min(MIN_ROWS, n_rows) for start, stop in rows)
    unit = step * -(-MIN_ROWS // step)
    assert all(start % unit == 0 for start, _ in rows)
    sizes = [stop - start for start, stop in rows]
    assert max(sizes) - min(sizes) < 2 * unit


paces = st.lists(
    st.tuples(st.integers(1, 1 << 16), st.none() | st.floats(1e-300, 1e300)), min_size=2, max_size=40
)


@given(paces=paces, in_flight=st.floats(1, 1e3), work=st.floats(0, 1e300))
def test_pieces_stay_within_bounds(
    paces: list[tuple[int, float | None]], in_flight: float, work: float
) -> None:
    assert 1 <= count_pieces(paces, in_flight, work) <= MAX_PIECES
    assert count_pieces(paces[:1], in_flight, work) == 1


def test_pieces_follow_slots_load_and_speed() -> None:
    even = [(1, 1e9)] * 4
    large = 1e10
    assert count_pieces([(1, None)] * 4, 1, 0) == 4
    assert [count_pieces(even, load, large) for load in (1, 2, 3, 4, 16)] == [4, 2, 2, 1, 1]
    assert count_pieces([(1, 1e9), (1, 1.2e9)], 1, large) == 2
    assert count_pieces([(2, 1e9), (1, 3e9)], 1, large) == 5, "(2·1 + 3) / 1"
    assert count_pieces([*even, (1, 1e8)], 1, large) == 20, "at most 4 for each slot"
    assert count_pieces([*even, (1, 1e8)], 4, large) == 10, "the slow one's share of four products: 41 / 4"
    assert count_pieces(even, 1, 1e9 * 0.012) == 2, "5 ms for a piece"
    assert count_pieces(even, 1, 1e9 * 0.001) == 1


def test_concrete_is_cut_between_tiles(stage: Stage) -> None:
    weights = {"w": torch.randn(1100, 8, generator=torch.Generator().manual_seed(1))}
    harness = EngineHarness("concrete", weights, stage.model)
    assert isinstance(harness.sealer, ConcreteSealer)
    x = torch.randn(2, 8)
    sealed = harness.seal("w", "forward", x)
    rows = partition(1100, 2, sealed.operand.row_step)
    assert rows == [(0, 550), (550, 1100)]
    y = open_checked(sealed, harness.answer("w", "forward", sealed, rows))
    assert not harness.excess("w", "forward", x, y).any()
