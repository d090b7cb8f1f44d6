"""One micro-batch: forward and backward against a snapshot of the adapter, in a thread of its own."""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from hetrain.data.packing import MicroBatch
from hetrain.nn.remote import ProductStats
from hetrain.nn.replica import Replica
from hetrain.public.errors import NotFinite
from hetrain.public.system import available_cores, flush_denormals
from hetrain.train.updater import Snapshot, Tensors


@dataclass(frozen=True)
class StepResult:
    """The result of one micro-batch.

    Attributes:
        batch: the micro-batch.
        staleness: updates between its snapshot and its own update.
        summed_loss: Σ −log p over its targets; NaN if the forward pass met a value that is not finite.
        gradients: of `summed_loss`, by adapter parameter; None if it, or a value to encrypt, is not finite.
        begin: when it began, as `time.perf_counter` counts.
        seconds: wall time.
        stats: what its remote products cost.
    """

    batch: MicroBatch
    staleness: int
    summed_loss: float
    gradients: Tensors | None
    begin: float
    seconds: float
    stats: ProductStats


def share_cores(in_flight: int) -> None:
    """Divides the processor's cores among the micro-batches in flight.

    Micro-batches that each use all cores wait for one another at the end of every small operation. With two
    in flight on two cores, one thread each made an update 16 % faster than two each.
    """
    torch.set_num_threads(max(available_cores() // in_flight, 1))


@contextmanager
def step_threads(count: int, abort: Callable[[], object]) -> Iterator[ThreadPoolExecutor]:
    """Threads for `count` steps at once, which take denormal numbers for zero.

    Args:
        count: number of threads.
        abort: called if the block ends by an exception; must make the steps in the threads fail soon, since
            the end of the block waits for them.
    """
    with ThreadPoolExecutor(count, "micro-batch", flush_denormals) as pool:
        was_frozen = gc.get_freeze_count() > 0  # an evaluation within training
        gc.collect()
        gc.freeze()  # modules and models outlive the steps: to walk them again and again took 3 % of the time
        try:
            yield pool
        except BaseException:  # KeyboardInterrupt and GeneratorExit must release the threads as well
            abort()
            raise
        finally:
            if not was_frozen:
                gc.unfreeze()


def run_step(replica: Replica, batch: MicroBatch, snapshot: Snapshot, seed: int) -> StepResult:
    """Gradients of the summed loss of `batch` at `snapshot`; dropout depends on (seed, batch index) alone.

    Values that are not finite are no error, but make it a result without gradients.
    """
    begin = time.perf_counter()
    replica.stats.reset()
    replica.load(snapshot.values)
    replica.seed_dropout(seed * 1_000_003 + batch.index)
    summed_loss, gradients = _differentiate(replica, batch)
    return StepResult(
        batch=batch,
        staleness=snapshot.staleness,
        summed_loss=summed_loss,
        gradients=gradients,
        begin=begin,
        seconds=time.perf_counter() - begin,
        stats=copy.copy(replica.stats),
    )


def _differentiate(replica: Replica, batch: MicroBatch) -> tuple[float, Tensors | None]:
    """`summed_loss` and `gradients` of a `StepResult`."""
    summed_loss, is_complete = math.nan, False
    with suppress(NotFinite):
        loss = replica.summed_loss(batch.tokens, batch.positions, batch.places, batch.targets, batch.rows)
        summed_loss = float(loss.detach())
        loss.backward()
        is_complete = True
    gradients = replica.take_gradients()  # also those of half a backward pass
    return summed_loss, gradients if is_complete and math.isfinite(summed_loss) else None


def run_evaluation(replica: Replica, batch: MicroBatch) -> float:
    """Σ −log p over the targets of `batch`, without gradients and without dropout."""
    replica.seed_dropout(None)
    with torch.no_grad():
        return float(replica.summed_loss(batch.tokens, batch.positions, batch.places, batch.targets))
