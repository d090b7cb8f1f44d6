"""The client's side of a fleet: who is there, where requests go, how products are cut. All of it is real."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from time import monotonic, sleep, time
from typing import TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetrain.nn.remote import ProductStats, RemoteMatmul
from hetrain.public.broker.connection import client, connection_pool
from hetrain.public.errors import NoWorker
from hetrain.public.protocol.registration import REGISTRATION_TTL_S, REGISTRY_KEY, WorkerRegistration
from hetrain.secret.engines.concrete import ConcreteSealer
from hetrain.secret.engines.rlwe.hints import Hint
from hetrain.transport.celery_channel import CeleryChannel, CeleryPending
from hetrain.transport.requests.state import Timeouts
from hetrain.transport.scheduling import partition as partition_module
from hetrain.transport.scheduling.partition import MAX_PIECES, MIN_ROWS, count_pieces, partition
from tasks.supervisor.server import stop
from tasks.supervisor.worker_process import spawn_worker
from tests.harness.engine import EngineHarness as Bench
from tests.harness.processes import BrokerServer as Serving
from tests.harness.processes import broker_server as serving

ROWS, K = 640, 96
NAMES = ("w0", "w1", "w2", "w3")
GUARD_S = 60
# Only what a test is about may bring a request back.
PATIENT = Timeouts(no_worker_s=10 * GUARD_S, deadline_s=10 * GUARD_S)

T = TypeVar("T")


@dataclass
class Stage:
    """A broker, a model's directory, and the workers that a test has started, by name."""

    served: Serving
    model: Path
    workers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *, model: Path | None = None, shards: str = "") -> None:
        self.workers[name] = spawn_worker(
            name,
            {
                "HETRAIN_BROKER_URL": self.served.url,
                "HETRAIN_MODELS": json.dumps([str(model or self.model)]),
                "HETRAIN_SHARDS": shards,
                "OMP_NUM_THREADS": "1",
            },
            self.served.log,
        )

    def await_cards(self, count: int) -> None:
        broker = client(connection_pool(self.served.url))
        eventually(lambda: broker.zcard(REGISTRY_KEY) == count)

    def send(self, signum: signal.Signals, *names: str) -> None:
        for name in names:
            os.kill(self.workers[name].pid, signum)

    def open(self, bench: Bench, timeouts: Timeouts = PATIENT) -> CeleryChannel:
        channel = CeleryChannel(self.served.url, timeouts=timeouts)
        plan, engine = bench.plan, bench.name
        try:
            within_guard(
                lambda: channel.prepare(plan.model, engine, plan.to_bytes(), plan.digest, bench.sealer.setup)
            )
        except BaseException:
            channel.close()
            raise
        return channel


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with serving() as served:
        made = Stage(served, tmp_path / "tiny")
        try:
            yield made
        finally:
            for worker in made.workers.values():
                os.kill(worker.pid, signal.SIGCONT)
            stop(list(made.workers.values()), grace_s=0)


def bench_of(stage: Stage, engine: str) -> Bench:
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(ROWS, K, generator=generator) for name in NAMES}
    return Bench(engine, weights, stage.model, hints=engine == "rlwe")


def within_guard(call: Callable[[], T]) -> T:
    """What `call` returns or raises; a call that hangs fails the test."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(call).result(GUARD_S)
    finally:
        pool.shutdown(wait=False)


def eventually(condition: Callable[[], bool]) -> None:
    end = monotonic() + GUARD_S
    while not condition():
        assert monotonic() < end
        sleep(0.02)


def seen(channel: CeleryChannel) -> dict[str, str]:
    """Name before the @ and queue of each worker that the channel sees."""
    return {
        card.worker.partition("@")[0]: card.queue for card in channel._router.registry.workers.registrations
    }


def ask(bench: Bench, channel: CeleryChannel, name: str, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Sends x·Wᵀ in one piece; what is returned waits for it."""
    sealed, rows = bench.seal(name, "forward", x), [(0, ROWS)]
    pending = channel.send(name, "forward", sealed.header, sealed.payload, rows)

    def answer() -> torch.Tensor:
        return sealed.opening.open(within_guard(pending.result).parts, rows)

    answer.pending = pending  # type: ignore[attr-defined]
    return answer


def queue_of(answer: Callable[[], torch.Tensor]) -> str:
    pending: CeleryPending = answer.pending  # type: ignore[attr-defined]
    return pending._requests[0].queue


def test_two_workers_share_every_product_and_nothing_changes(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition_module, "MIN_PIECE_S", 1e-9)  # these products are tiny
    clear = bench_of(stage, "clear")
    stage.start("a")
    stage.start("b")
    stage.await_cards(2)
    with closing(stage.open(clear)) as channel:
        assert channel.partition("w0", ROWS, 4 * K * 256, 1) == [(0, 320), (320, 640)]
        outsourcer = RemoteMatmul(channel, clear.sealer, ProductStats())
        local = RemoteMatmul(clear.channel, clear.sealer, ProductStats())
        rates = channel._router.throughput
        workers = [card.worker for card in channel._router.registry.workers.registrations]
        rounds = 0
        while rounds < 4 or not all(rates.of(worker) for worker in workers):
            rounds += 1
            assert rounds < 200
            for direction, k in (("forward", K), ("backward", ROWS)):
                x, group = torch.randn(100, k), clear.group(NAMES[rounds % 4])
                y = outsourcer.multiply(group, direction, x)  # type: ignore[arg-type]
                assert torch.equal(y, local.multiply(group, direction, x))  # type: ignore[arg-type]
        name = f"hetrain:{channel.job}:*"
    assert not client(connection_pool(stage.served.url)).keys(name)

    # With hints, from several threads: cuts differ with the load, and still every hint is completed.
    rlwe = bench_of(stage, "rlwe")
    with closing(stage.open(rlwe)) as channel, ThreadPoolExecutor(4) as pool:
        outsourcer = RemoteMatmul(channel, rlwe.sealer, ProductStats())

        def work(index: int) -> bool:
            x, group = torch.randn(20, K), rlwe.group(NAMES[index % 4])
            y = outsourcer.multiply(group, "forward", x)
            return bool(rlwe.excess(group.name, "forward", x, y).any())

        assert not any(within_guard(lambda: list(pool.map(work, range(16)))))
        for name in NAMES:
            assert rlwe.seal(name, "forward", torch.randn(3, K)).header["result"] == "b"


def test_requests_follow_the_shards_and_leave_dead_workers(stage: Stage) -> None:
    bench = bench_of(stage, "clear")
    stage.start("first", shards="0/2")
    stage.await_cards(1)
    x = torch.randn(5, K)
    with pytest.raises(NoWorker, match=r"2 of the 4 groups of tiny: w2, w3 \(shards 1-1/2\)") as error:
        stage.open(bench, Timeouts(no_worker_s=2))
    assert "HETRAIN_SHARDS=1-1/2" in error.value.hint
    stage.start("last", shards="1/2")
    stage.start("whole")
    stage.await_cards(3)
    with closing(stage.open(bench)) as channel:
        eventually(lambda: seen(channel) == {"first": "gpu.0-0of2", "last": "gpu.1-1of2", "whole": "gpu"})
        stage.send(signal.SIGSTOP, *stage.workers)
        asked = {name: [ask(bench, channel, name, x) for _ in range(4)] for name in NAMES}
        queues = {name: sorted(map(queue_of, answers)) for name, answers in asked.items()}
        assert queues["w0"] == queues["w1"] == ["gpu", "gpu", "gpu.0-0of2", "gpu.0-0of2"]
        assert queues["w2"] == ["gpu.1-1of2"] * 4
        assert queues["w3"] == ["gpu", "gpu", "gpu.1-1of2", "gpu.1-1of2"]
        stage.send(signal.SIGKILL, "last")
        stage.send(signal.SIGCONT, "first", "whole")
        for name, answers in asked.items():
            expected = bench.multiply(name, "forward", x)
            assert all(torch.equal(answer(), expected) for answer in answers)
        # The last one that serves w2 goes: what waits for it is given up, what does not goes on.
        stage.send(signal.SIGTERM, "whole")  # it says goodbye
        eventually(lambda: seen(channel) == {"first": "gpu.0-0of2"})
    with closing(CeleryChannel(stage.served.url, timeouts=Timeouts(no_worker_s=2))) as channel:
        channel._router.follow(bench.plan)
        channel._prepared = prepared(bench, channel)
        answer = ask(bench, channel, "w2", x)
        assert torch.equal(ask(bench, channel, "w1", x)(), bench.multiply("w1", "forward", x))
        with pytest.raises(NoWorker, match="shards 1-1/2"):
            answer()


def prepared(bench: Bench, channel: CeleryChannel):  # type: ignore[no-untyped-def]
    """What `prepare` would have left, had all workers been there."""
    from hetrain.transport.requests.state import prepare_task

    plan = bench.plan.to_bytes()
    blob = channel._connection.store.put(channel.job, "plan", bench.plan.digest, [plan])
    return prepare_task(bench.plan.model, bench.name, blob, {})


def test_a_worker_of_another_model_does_not_end_the_job(stage: Stage, tmp_path: Path) -> None:
    bench = bench_of(stage, "clear")
    other = Bench("clear", {"v": torch.randn(3, 3)}, tmp_path / "other")
    stage.start("own")
    stage.start("stranger", model=tmp_path / "other")
    stage.await_cards(2)
    with closing(stage.open(bench)) as channel:
        stage.send(signal.SIGSTOP, "own")
        x = torch.randn(5, K)
        answers = [ask(bench, channel, "w0", x) for _ in range(3)]
        requests = [answer.pending._requests[0] for answer in answers]  # type: ignore[attr-defined]
        eventually(lambda: any(request.refused_on for request in requests))
        stage.send(signal.SIGCONT, "own")
        expected = bench.multiply("w0", "forward", x)
        assert all(torch.equal(answer(), expected) for answer in answers)
    with closing(stage.open(other)):
        pass


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
        {"version": 2},
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
    channel = CeleryChannel(stage.served.url)
    watch, broker = channel._router.registry, channel._connection.client
    channel._collector.stop(NoWorker("this test refreshes by itself"))
    channel._collector.join(GUARD_S)
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
    assert watch.refresh() == {"gpu.0-0of2"}
    broker.set(REGISTRY_KEY, "of another type", ex=60)
    caplog.clear()
    assert [watch.refresh(), watch.refresh()] == [{"gpu"}, frozenset()]
    assert watch.workers.registrations == ()
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    channel.close()


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


def test_hints_are_completed_by_overlapping_ranges(stage: Stage) -> None:
    bench = bench_of(stage, "rlwe")
    x = torch.randn(5, K)
    hint: Hint = bench.sealer.hints.hint(bench.group("w0"), "forward")  # type: ignore[attr-defined]
    for rows in ([(100, 300)], [(50, 150), (290, 400)], [(0, 60)], [(0, 320), (320, 640)]):
        assert not hint.is_ready
        sealed = bench.seal("w0", "forward", x)
        sealed.opening.open(bench.answer("w0", "forward", sealed, rows), rows)
    assert hint.is_ready
    assert not bench.excess("w0", "forward", x, bench.multiply("w0", "forward", x)).any()


def test_concrete_is_cut_between_tiles(stage: Stage) -> None:
    weights = {"w": torch.randn(1100, 8, generator=torch.Generator().manual_seed(1))}
    bench = Bench("concrete", weights, stage.model)
    assert isinstance(bench.sealer, ConcreteSealer)
    x = torch.randn(2, 8)
    sealed = bench.seal("w", "forward", x)
    rows = partition(1100, 2, sealed.row_step)
    assert rows == [(0, 550), (550, 1100)]
    y = sealed.opening.open(bench.answer("w", "forward", sealed, rows), rows)
    assert not bench.excess("w", "forward", x, y).any()
