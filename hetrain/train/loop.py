"""The loop: keeps several micro-batches in flight, and makes an update when all of its own have finished.

The main thread draws micro-batches, takes snapshots and makes updates; each replica runs its step in a thread
of the pool. So the adapter has one writer, and a step sees one version of it from start to end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from hetrain.config import TrainingConfig
from hetrain.data.packing import MicroBatch
from hetrain.nn.replica import Replica
from hetrain.public.errors import NotFinite
from hetrain.train.signals import Stop, never
from hetrain.train.staleness import Entry, UpdateQueue
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
        replicas: ``config.replicas`` of them.
        batches: micro-batches, drawn as replicas become free, from the first of an update on.
        config: micro-batches of an update, by how much updates may overlap, how many in a row may be skipped,
            and the seed of LoRA dropout.
        abort: called when the loop ends early; see `step_threads`.
        stop: called between updates; once it returns true no update begins any more, and training ends when
            those that have begun are made.

    Raises:
        NotFinite: `config.max_skipped_updates` updates in a row were skipped; they have been yielded.
        HetrainError: whatever a step raises. Both after `abort`.
    """
    skipped = 0
    with step_threads(len(replicas), abort) as pool:
        for applied in _updates(pool, updater, replicas, batches, config, stop):
            yield applied
            skipped = skipped + 1 if applied.update.is_skipped else 0
            if skipped == config.max_skipped_updates:
                raise _diverged(applied.update.step, skipped)


def _updates(
    pool: ThreadPoolExecutor,
    updater: Updater,
    replicas: Sequence[Replica],
    batches: Iterator[MicroBatch],
    config: TrainingConfig,
    stop: Stop,
) -> Iterator[AppliedUpdate]:
    queue: UpdateQueue[StepResult] = UpdateQueue(
        updater.version, config.batches_per_update, config.staleness_bound
    )
    free, is_drained = list(replicas), False
    in_flight: dict[Future[StepResult], tuple[Replica, Entry[StepResult]]] = {}
    while True:
        if results := queue.take(is_drained=is_drained):
            yield _apply(updater, results)
            continue
        while free and queue.can_start and not is_drained:
            batch = None if queue.is_between_updates and stop() else next(batches, None)
            if batch is None:
                is_drained = True
                break
            entry, replica = queue.start(), free.pop()
            snapshot = updater.snapshot(entry.staleness)
            in_flight[pool.submit(run_step, replica, batch, snapshot, config.seed)] = replica, entry
        if not in_flight and queue.is_empty:
            return
        for future in _wait_for_any(in_flight, stop) if in_flight else ():
            replica, entry = in_flight.pop(future)
            entry.result = future.result()
            free.append(replica)


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
