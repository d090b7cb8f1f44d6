"""The loop: keeps several micro-batches in flight and updates the adapter as their gradients come back.

The main thread draws micro-batches, takes snapshots and applies updates; each replica runs its step in a
thread of the pool. So the adapter has one writer, and a step sees one version of it from start to end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from hetrain.nn.replica import Replica
from hetrain.train.packing import MicroBatch
from hetrain.train.settings import FlightSettings
from hetrain.train.step import StepResult, run_step
from hetrain.train.updates import Update, Updater


@dataclass(frozen=True)
class Applied:
    """One update and the micro-batches that made it."""

    update: Update
    results: tuple[StepResult, ...]


def train(
    updater: Updater,
    replicas: Sequence[Replica],
    batches: Iterator[MicroBatch],
    flight: FlightSettings,
    seed: int,
    abort: Callable[[], None],
) -> Iterator[Applied]:
    """Trains until `batches` is exhausted, yielding every update after it was applied.

    Args:
        updater: owns the adapter.
        replicas: ``flight.in_flight`` of them.
        batches: micro-batches, drawn as replicas become free.
        flight: asynchronous, or in lock step.
        seed: for LoRA dropout.
        abort: called when the loop ends early, whatever the reason; must make steps in other threads fail
            soon, since the loop waits for them.

    Raises:
        HetrainError: whatever a step raises, after `abort`.
    """
    strategy = _lock_step if flight.sync else _asynchronous
    with ThreadPoolExecutor(len(replicas), thread_name_prefix="micro-batch") as pool:
        try:
            yield from strategy(pool, updater, replicas, batches, seed)
        except BaseException:  # KeyboardInterrupt and GeneratorExit must release the threads as well
            abort()
            raise


def _asynchronous(
    pool: ThreadPoolExecutor,
    updater: Updater,
    replicas: Sequence[Replica],
    batches: Iterator[MicroBatch],
    seed: int,
) -> Iterator[Applied]:
    free = list(replicas)
    flying: dict[Future[StepResult], Replica] = {}
    while True:
        for batch in itertools.islice(batches, len(free)):
            replica = free.pop()
            flying[pool.submit(run_step, replica, batch, updater.snapshot(), seed)] = replica
        if not flying:
            return
        landed, _ = wait(flying, return_when=FIRST_COMPLETED)
        for future in landed:
            result = future.result()
            free.append(flying.pop(future))
            yield Applied(updater.apply([result.gradients], result.batch.n_targets), (result,))


def _lock_step(
    pool: ThreadPoolExecutor,
    updater: Updater,
    replicas: Sequence[Replica],
    batches: Iterator[MicroBatch],
    seed: int,
) -> Iterator[Applied]:
    while window := list(itertools.islice(batches, len(replicas))):
        snapshot = updater.snapshot()
        flying = [
            pool.submit(run_step, replica, batch, snapshot, seed)
            for replica, batch in zip(replicas, window, strict=False)
        ]
        wait(flying, return_when="FIRST_EXCEPTION")
        for future in flying:
            if future.done():
                future.result()
        results = tuple(future.result() for future in flying)
        n_targets = sum(result.batch.n_targets for result in results)
        yield Applied(updater.apply([result.gradients for result in results], n_targets), results)
