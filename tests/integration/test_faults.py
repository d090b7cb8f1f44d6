"""Workers are killed at random moments, fifty times, and training does not notice.

A job in lock step with the exact engine `clear` and an asynchronous one with `rlwe` share three workers. Each
kill is a SIGKILL to one of them, and another one takes its place. Half of the kills come at random times,
whatever the worker is doing, the others in the middle of a request: of the same request not more than twice,
since one that ends every worker that takes it is given up.
"""

from __future__ import annotations

import logging
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from time import monotonic, sleep

import pytest
import torch

from hetrain.config import LoraConfig, OutsourcingConfig, TrainingConfig
from hetrain.data.packing import MicroBatch, epochs
from hetrain.data.tokenization import Row, read_rows
from hetrain.nn.lora import adapter_parameters, add_adapter
from hetrain.public.broker import connection as broker
from hetrain.train.loop import train
from hetrain.train.session import open_base, open_session
from hetrain.train.updater import Tensors, Updater
from tests.harness.forkserver import Fleet, fleet_of
from tests.harness.processes import serving

HANDBOOK = Path(__file__).resolve().parents[2] / "examples" / "handbook.jsonl"
SEED = int(os.environ.get("HETRAIN_TEST_SEED") or random.SystemRandom().randrange(1 << 32))
KILLS = 50
WORKERS = 3
TOKENS = 64
WINDOWS = 4
MEAN_PAUSE_S = 0.8
LONGEST_AIM_S = 4.0
LOADING = threading.Lock()  # transformers patches torch while it creates a model

logger = logging.getLogger(__name__)

Run = tuple[int, Tensors]


class Assassin:
    """Kills workers one by one, after pauses of random length, and notes what each was doing."""

    def __init__(self, fleet: Fleet, url: str) -> None:
        self.has_finished = False
        self.victims: Counter[str] = Counter()
        self._hits: Counter[bytes] = Counter()
        self._fleet = fleet
        self._broker = broker.client(broker.connection_pool(url, max_connections=1))
        self._chance = random.Random(SEED)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._hunt, daemon=True)

    def __enter__(self) -> Assassin:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _hunt(self) -> None:
        try:
            while not self._stopped.is_set() and not self._broker.keys("hetrain:*:alive"):
                sleep(0.02)  # until a job begins
            while self.victims.total() < KILLS and not self._stopped.wait(self._pause()):
                self._strike(self._aim() if self._chance.random() < 0.5 else None)
        finally:
            self.has_finished = True

    def _pause(self) -> float:
        return self._chance.expovariate(1 / MEAN_PAUSE_S)

    def _aim(self) -> int | None:
        """Somebody in the middle of a request; None where nobody is seen there for a while."""
        end = monotonic() + LONGEST_AIM_S
        while monotonic() < end:
            running = self._running()
            aims = [pid for pid, request in running.items() if self._hits[request] < 2]
            if aims:
                return self._chance.choice(sorted(aims))
            sleep(0.002)
        return None

    def _strike(self, pid: int | None) -> None:
        living = self._fleet.living()
        if pid not in living:
            pid = self._chance.choice(sorted(living))
        self._fleet.kill(pid)
        request = self._running().get(pid)  # the lease of a dead worker lasts for seconds
        if request is not None:
            self._hits[request] += 1
        self.victims["busy" if request else "idle" if living[pid] else "starting"] += 1

    def _running(self) -> dict[int, bytes]:
        """The requests that are leased, by the process id of the worker that holds the lease."""
        names = list(self._broker.scan_iter("hetrain:*:lease:*", count=1000))
        owners = self._broker.mget(names) if names else []
        return {int(owner.split(b":")[1]): name for name, owner in zip(names, owners, strict=True) if owner}


class Drawn:
    """Micro-batches until `assassin` has finished: a few windows at least, and full ones."""

    def __init__(self, batches: Iterator[MicroBatch], window: int, assassin: Assassin) -> None:
        self.count = 0
        self._batches, self._window, self._assassin = batches, window, assassin

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        windows, begun = divmod(self.count, self._window)
        if self._assassin.has_finished and not begun and windows >= WINDOWS:
            raise StopIteration
        self.count += 1
        return next(self._batches)


def run(url: str, model: Path, engine: str, config: TrainingConfig, batches: Iterator[MicroBatch]) -> Run:
    """Number of updates that training on `batches` makes, and the adapter after it."""
    with ExitStack() as stack:
        with LOADING:
            base = open_base(str(model))
            session = stack.enter_context(open_session(base, OutsourcingConfig(engine=engine), url, "cpu"))
            adapted = add_adapter(session.split, LoraConfig(r=4, alpha=8, dropout=0.1), config.seed)
        updater = Updater(adapter_parameters(adapted), config, 0)
        replicas = session.replicas(adapted, config.in_flight)
        applied = train(updater, replicas, batches, config, session.channel.close)
        steps = [each.update.step for each in applied]
    assert steps == list(range(1, len(steps) + 1))
    return len(steps), updater.snapshot().values


def endless(rows: list[Row], seed: int) -> Iterator[MicroBatch]:
    return epochs(rows, TOKENS, seed, None)


@pytest.mark.usefixtures("one_thread")
def test_fifty_kills_change_neither_the_updates_nor_a_bit(tiny_llama: Path, tmp_path: Path) -> None:
    logger.warning("HETRAIN_TEST_SEED=%d", SEED)
    rows = read_rows(HANDBOOK, open_base(str(tiny_llama)).tokenizer, TOKENS)[:40]
    common = TrainingConfig(learning_rate=1e-3, lr_scheduler_type="constant")
    in_step, at_once = (
        replace(common, in_flight=3, sync=True, seed=1),
        replace(common, in_flight=2, seed=2),
    )
    with (
        serving() as served,
        fleet_of(WORKERS, served.url, tiny_llama, tmp_path / "workers.log") as fleet,
        ThreadPoolExecutor(2) as pool,
    ):
        with Assassin(fleet, served.url) as assassin:
            first = Drawn(endless(rows, 1), in_step.in_flight, assassin)
            second = Drawn(endless(rows, 2), 1, assassin)
            stepping = pool.submit(run, served.url, tiny_llama, "clear", in_step, first)
            running = pool.submit(run, served.url, tiny_llama, "rlwe", at_once, second)
            (updates, disturbed), (updates_at_once, encrypted) = stepping.result(), running.result()
        logger.warning("killed: %s; updates: %d, %d", dict(assassin.victims), updates, updates_at_once)
        assert assassin.victims.total() == KILLS
        assert assassin.victims["busy"] >= KILLS // 10, "hardly anything was disturbed"
        assert updates * in_step.in_flight == first.count
        assert updates_at_once == second.count
        again, calm = run(served.url, tiny_llama, "clear", in_step, islice(endless(rows, 1), first.count))
    assert again == updates
    assert calm.keys() == disturbed.keys()
    assert all(torch.equal(calm[name], disturbed[name]) for name in calm)
    assert all(bool(value.isfinite().all()) for value in encrypted.values())
