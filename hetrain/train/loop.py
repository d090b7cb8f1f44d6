"""The loop: keeps several micro-batches in flight and updates the adapter as their gradients come back.

The main thread draws micro-batches, takes snapshots and applies updates; each replica runs its step in a
thread of the pool. So the adapter has one writer, and a step sees one version of it from start to end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from hetrain.data.packing import MicroBatch
from hetrain.nn.replica import Replica
from hetrain.train.settings import FlightSettings
from hetrain.train.signals import Stop, never
from hetrain.train.staleness import Entry, StalenessGate
from hetrain.train.step import StepResult, run_step
from hetrain.train.updater import Update, Updater

_LOOK_S = 0.5  # how often a waiting loop looks whether it should stop


@dataclass(frozen=True)
class AppliedUpdate:
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
    stop: Stop = never,
) -> Generator[AppliedUpdate, None, None]:
    """Trains until `batches` is exhausted, yielding every update after it was applied.

    Args:
        updater: owns the adapter.
        replicas: ``flight.in_flight`` of them.
        batches: micro-batches, drawn as replicas become free.
        flight: asynchronous, or in lock step.
        seed: for LoRA dropout.
        abort: called when the loop ends early, whatever the reason; must make steps in other threads fail
            soon, since the loop waits for them.
        stop: asked again and again; once it is true no micro-batch starts any more, and training ends when
            those in flight have been applied.

    Raises:
        HetrainError: whatever a step raises, after `abort`.
    """
    with ThreadPoolExecutor(len(replicas), thread_name_prefix="micro-batch") as pool:
        try:
            if flight.sync:
                yield from _lock_step(pool, updater, replicas, batches, seed, stop)
            else:
                yield from _asynchronous(pool, updater, replicas, batches, flight.staleness_bound, seed, stop)
        except BaseException:  # KeyboardInterrupt and GeneratorExit must release the threads as well
            abort()
            raise


def _asynchronous(
    pool: ThreadPoolExecutor,
    updater: Updater,
    replicas: Sequence[Replica],
    batches: Iterator[MicroBatch],
    bound: int,
    seed: int,
    stop: Stop,
) -> Iterator[AppliedUpdate]:
    """Every micro-batch makes one update, with a staleness of at most `bound`: see `schedule`."""
    schedule: StalenessGate[StepResult] = StalenessGate(bound)
    free = list(replicas)
    in_flight: dict[Future[StepResult], tuple[Replica, Entry[StepResult]]] = {}
    while True:
        while (result := schedule.take()) is not None:
            yield AppliedUpdate(updater.apply([result.gradients], result.batch.n_targets), (result,))
        while free and schedule.can_start and not stop():
            batch = next(batches, None)
            if batch is None:
                break
            replica = free.pop()
            future = pool.submit(run_step, replica, batch, updater.snapshot(), seed)
            in_flight[future] = replica, schedule.start()
        if not in_flight:
            return
        for future in _wait_for_any(in_flight, stop):
            replica, entry = in_flight.pop(future)
            schedule.finish(entry, future.result())
            free.append(replica)


def _lock_step(
    pool: ThreadPoolExecutor,
    updater: Updater,
    replicas: Sequence[Replica],
    batches: Iterator[MicroBatch],
    seed: int,
    stop: Stop,
) -> Iterator[AppliedUpdate]:
    """As many micro-batches as there are replicas make one update, gradients added up in their order."""
    while not stop() and (window := list(itertools.islice(batches, len(replicas)))):
        snapshot = updater.snapshot()
        futures = [
            pool.submit(run_step, replica, batch, snapshot, seed)
            for replica, batch in zip(replicas, window, strict=False)
        ]
        in_flight = set(futures)
        while in_flight:
            finished = _wait_for_any(in_flight, stop)
            in_flight -= finished
            for future in finished:
                future.result()  # a failure ends the run, whatever the others still do
        results = tuple(future.result() for future in futures)
        n_targets = sum(result.batch.n_targets for result in results)
        yield AppliedUpdate(updater.apply([result.gradients for result in results], n_targets), results)


def _wait_for_any(in_flight: Collection[Future[StepResult]], stop: Stop) -> set[Future[StepResult]]:
    """Waits for at least one step, and lets `stop` be heard meanwhile."""
    while True:
        finished, _ = wait(in_flight, _LOOK_S, FIRST_COMPLETED)
        stop()
        if finished:
            return finished
