"""Kills workers at random moments while two jobs train, and compares with undisturbed training.

A job in lock step with the exact engine `clear` and an asynchronous one with `rlwe` share three workers. Each
kill is a SIGKILL to one of them, and another one takes its place. Half of the kills come at random times,
whatever the worker is doing, the others in the middle of a request: of the same request not more than twice,
since a request that ends every worker that takes it is given up.
"""

from __future__ import annotations

import logging
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from hetrain.config import LoraConfig, OutsourcingConfig, TrainingConfig
from hetrain.data.packing import MicroBatch, epochs
from hetrain.data.tokenization import Row, read_rows
from hetrain.nn.lora import adapter_parameters, add_adapter
from hetrain.public.broker import connection as broker
from hetrain.train.loop import train
from hetrain.train.session import open_base, open_session
from hetrain.train.updater import Tensors, Updater
from tests.harness.forkserver import ForkedWorkers, forked_workers
from tests.harness.processes import HANDBOOK, broker_server
from tests.harness.waiting import eventually

SEED = int(os.environ.get("HETRAIN_TEST_SEED") or random.SystemRandom().randrange(1 << 32))
WORKERS = 3
TOKENS = 64
WINDOWS = 4
MEAN_PAUSE_S = 0.8
LONGEST_AIM_S = 4.0
LOADING = threading.Lock()  # transformers patches torch while it creates a model

logger = logging.getLogger(__name__)

Run = tuple[int, Tensors]


class RandomKiller:
    """Kills workers one by one, after pauses of random length, and counts what each was doing."""

    def __init__(self, workers: ForkedWorkers, url: str, kills: int) -> None:
        self._kills = kills
        self.has_finished = False
        self.killed: Counter[str] = Counter()
        self._kills_of_request: Counter[bytes] = Counter()
        self._workers = workers
        self._broker = broker.client(broker.connection_pool(url, max_connections=1))
        self._random = random.Random(SEED)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> RandomKiller:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            eventually(lambda: self._stopped.is_set() or self._broker.keys("hetrain:*:alive"))  # a job begins
            while self.killed.total() < self._kills and not self._stopped.wait(self._pause()):
                self._kill(self._busy_worker() if self._random.random() < 0.5 else None)
        finally:
            self.has_finished = True

    def _pause(self) -> float:
        return self._random.expovariate(1 / MEAN_PAUSE_S)

    def _busy_worker(self) -> int | None:
        """A worker in the middle of a request; None where there is none for a while."""

        def candidates() -> list[int]:
            leased = self._leased()
            return sorted(pid for pid, request in leased.items() if self._kills_of_request[request] < 2)

        with suppress(AssertionError):
            return self._random.choice(eventually(candidates, LONGEST_AIM_S, interval_s=0.002))
        return None

    def _kill(self, pid: int | None) -> None:
        running = self._workers.running()
        if pid not in running:
            pid = self._random.choice(sorted(running))
        self._workers.kill(pid)
        request = self._leased().get(pid)  # the lease of a dead worker lasts for seconds
        if request is not None:
            self._kills_of_request[request] += 1
        self.killed["busy" if request else "idle" if running[pid] else "starting"] += 1

    def _leased(self) -> dict[int, bytes]:
        """The requests that are leased, by the process id of the worker that holds the lease."""
        names = list(self._broker.scan_iter("hetrain:*:lease:*", count=1000))
        owners = self._broker.mget(names) if names else []
        return {int(owner.split(b":")[1]): name for name, owner in zip(names, owners, strict=True) if owner}


class BatchesUntilKilled:
    """Micro-batches until `killer` has finished: a few windows at least, and full ones."""

    def __init__(self, batches: Iterator[MicroBatch], window: int, killer: RandomKiller) -> None:
        self.count = 0
        self._batches, self._window, self._killer = batches, window, killer

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        windows, begun = divmod(self.count, self._window)
        if self._killer.has_finished and not begun and windows >= WINDOWS:
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
        replicas = session.replicas(adapted, config.replicas)
        applied = train(updater, replicas, batches, config, session.channel.close)
        steps = [each.update.step for each in applied]
    assert steps == list(range(1, len(steps) + 1))
    return len(steps), updater.snapshot().values


def endless(rows: list[Row], seed: int) -> Iterator[MicroBatch]:
    return epochs(rows, TOKENS, seed, None)


def check_that_kills_change_nothing(kills: int, model: Path, directory: Path) -> None:
    """Neither the number of updates of both jobs nor a bit of the first one's adapter.

    Args:
        kills: how many workers are killed.
        model: the directory of a tiny model.
        directory: for the workers' log.
    """
    logger.warning("HETRAIN_TEST_SEED=%d", SEED)
    rows = read_rows(HANDBOOK, open_base(str(model)).tokenizer, TOKENS)[:40]
    common = TrainingConfig(
        learning_rate=1e-3, lr_scheduler_type="constant", micro_batch_tokens=TOKENS, batch_tokens=TOKENS
    )
    in_step = replace(common, batch_tokens=3 * TOKENS, in_flight=3, seed=1)
    at_once = replace(common, max_staleness=1, seed=2)
    with (
        broker_server() as server,
        forked_workers(WORKERS, server.url, model, directory / "workers.log") as workers,
        ThreadPoolExecutor(2) as pool,
    ):
        with RandomKiller(workers, server.url, kills) as killer:
            first = BatchesUntilKilled(endless(rows, 1), in_step.batches_per_update, killer)
            second = BatchesUntilKilled(endless(rows, 2), 1, killer)
            stepping = pool.submit(run, server.url, model, "clear", in_step, first)
            running = pool.submit(run, server.url, model, "rlwe", at_once, second)
            (updates, disturbed), (updates_at_once, encrypted) = stepping.result(), running.result()
        logger.warning("killed: %s; updates: %d, %d", dict(killer.killed), updates, updates_at_once)
        assert killer.killed.total() == kills
        assert killer.killed["busy"] >= kills // 10, "hardly anything was disturbed"
        assert updates * in_step.batches_per_update == first.count
        assert updates_at_once == second.count
        again, undisturbed = run(server.url, model, "clear", in_step, islice(endless(rows, 1), first.count))
    assert again == updates
    assert undisturbed.keys() == disturbed.keys()
    assert all(torch.equal(undisturbed[name], disturbed[name]) for name in undisturbed)
    assert all(bool(value.isfinite().all()) for value in encrypted.values())
