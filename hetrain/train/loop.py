"""The loop: keeps several micro-batches in flight and updates the adapter as their gradients arrive.

The main thread draws micro-batches, takes snapshots and applies updates; each replica runs its step in a
thread of the pool. So the adapter has one writer, and a step sees one version of it from start to end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from hetrain.config import TrainingConfig
from hetrain.data.packing import MicroBatch
from hetrain.nn.replica import Replica
from hetrain.public.errors import NotFinite
from hetrain.train.signals import Stop, never
from hetrain.train.staleness import Entry, StalenessGate
from hetrain.train.step import StepResult, run_step, step_threads
from hetrain.train.updater import Update, Updater

_STOP_POLL_S = 0.5


@dataclass(frozen=True)
class AppliedUpdate:
    """One update and the micro-batches that made it."""

    update: Update
    results: tuple[StepResult, ...]


def train(
    updater: Updater,
    replicas: Sequence[Replica],
    batches: Iterator[MicroBatch],
    config: TrainingConfig,
    abort: Callable[[], None],
    stop: Stop = never,
) -> Generator[AppliedUpdate, None, None]:
    """Trains until `batches` is exhausted, yielding every update after it was applied or skipped.

    Args:
        updater: owns the adapter.
        replicas: ``config.in_flight`` of them.
        batches: micro-batches, drawn as replicas become free.
        config: whether and by how much updates may overtake each other, how many in a row may be skipped, and
            the seed of LoRA dropout.
        abort: called when the loop ends early; see `step_threads`.
        stop: called between updates; once it returns true no micro-batch starts any more, and training ends
            when those in flight have been applied.

    Raises:
        NotFinite: `config.max_skipped_updates` updates in a row were skipped; they have been yielded.
        HetrainError: whatever a step raises. Both after `abort`.
    """
    course = _lock_step if config.sync else _asynchronous
    skipped = 0
    with step_threads(len(replicas), abort) as pool:
        for applied in course(pool, updater, replicas, batches, config, stop):
            yield applied
            skipped = skipped + 1 if applied.update.is_skipped else 0
            if skipped == config.max_skipped_updates:
                raise _diverged(applied.update.step, skipped)


def _asynchronous(
    pool: ThreadPoolExecutor,
    updater: Updater,
    replicas: Sequence[Replica],
    batches: Iterator[MicroBatch],
    config: TrainingConfig,
    stop: Stop,
) -> Iterator[AppliedUpdate]:
    """Every micro-batch makes one update, with a staleness of at most `config.staleness_bound`."""
    gate: StalenessGate[StepResult] = StalenessGate(config.staleness_bound)
    free = list(replicas)
    in_flight: dict[Future[StepResult], tuple[Replica, Entry[StepResult]]] = {}
    while True:
        while (result := gate.take()) is not None:
            yield _apply(updater, (result,))
        while free and gate.can_start and not stop():
            batch = next(batches, None)
            if batch is None:
                break
            replica = free.pop()
            future = pool.submit(run_step, replica, batch, updater.snapshot(), config.seed)
            in_flight[future] = replica, gate.start()
        if not in_flight:
            return
        for future in _wait_for_any(in_flight, stop):
            replica, entry = in_flight.pop(future)
            gate.finish(entry, future.result())
            free.append(replica)


def _lock_step(
    pool: ThreadPoolExecutor,
    updater: Updater,
    replicas: Sequence[Replica],
    batches: Iterator[MicroBatch],
    config: TrainingConfig,
    stop: Stop,
) -> Iterator[AppliedUpdate]:
    """As many micro-batches as there are replicas make one update, gradients added up in their order."""
    while not stop() and (window := list(itertools.islice(batches, len(replicas)))):
        snapshot = updater.snapshot()
        futures = [
            pool.submit(run_step, replica, batch, snapshot, config.seed)
            for replica, batch in zip(replicas, window, strict=False)
        ]
        in_flight = set(futures)
        while in_flight:
            finished = _wait_for_any(in_flight, stop)
            in_flight -= finished
            for future in finished:
                future.result()  # a failure ends the run at once
        yield _apply(updater, tuple(future.result() for future in futures))


def _apply(updater: Updater, results: tuple[StepResult, ...]) -> AppliedUpdate:
    n_targets = sum(result.batch.n_targets for result in results)
    return AppliedUpdate(updater.apply([result.gradients for result in results], n_targets), results)


def _diverged(step: int, skipped: int) -> NotFinite:
    return NotFinite(
        f"{skipped} updates in a row, up to update {step}, were skipped: loss or gradients were not finite",
        hint="If the losses before them rose, start anew with a lower `learning_rate` or `max_grad_norm`; "
        "else go on with other workers and `resume_from_checkpoint` latest",
    )


def _wait_for_any(in_flight: Collection[Future[StepResult]], stop: Stop) -> set[Future[StepResult]]:
    """Waits for at least one step, and calls `stop` meanwhile."""
    while True:
        finished, _ = wait(in_flight, _STOP_POLL_S, FIRST_COMPLETED)
        stop()
        if finished:
            return finished
