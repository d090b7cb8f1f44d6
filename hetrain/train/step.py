"""One micro-batch: forward and backward against a snapshot of the adapter, in a thread of its own."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hetrain.data.packing import MicroBatch
from hetrain.nn.remote import ProductStats
from hetrain.nn.replica import Replica
from hetrain.public.system import available_cores
from hetrain.train.updater import Snapshot, Tensors


@dataclass(frozen=True)
class StepResult:
    """The result of one micro-batch.

    Attributes:
        batch: the micro-batch.
        version: the snapshot's version.
        summed_loss: Σ −log p over its targets.
        gradients: of `summed_loss`, by adapter parameter.
        seconds: wall time.
        stats: what its remote products cost.
    """

    batch: MicroBatch
    version: int
    summed_loss: float
    gradients: Tensors
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
    """Threads for `count` steps at once.

    Args:
        count: number of threads.
        abort: called if the block ends by an exception; must make the steps in the threads fail soon, since
            the end of the block waits for them.
    """
    with ThreadPoolExecutor(count, thread_name_prefix="micro-batch") as pool:
        try:
            yield pool
        except BaseException:  # KeyboardInterrupt and GeneratorExit must release the threads as well
            abort()
            raise


def run_step(replica: Replica, batch: MicroBatch, snapshot: Snapshot, seed: int) -> StepResult:
    """Gradients of the summed loss of `batch` at `snapshot`; dropout depends on (seed, batch index) alone."""
    begin = time.perf_counter()
    replica.stats.reset()
    replica.load(snapshot.values)
    replica.seed_dropout(seed * 1_000_003 + batch.index)
    loss = replica.summed_loss(batch.tokens, batch.positions, batch.targets, batch.lengths)
    loss.backward()
    return StepResult(
        batch=batch,
        version=snapshot.version,
        summed_loss=float(loss.detach()),
        gradients=replica.take_gradients(),
        seconds=time.perf_counter() - begin,
        stats=copy.copy(replica.stats),
    )


def run_evaluation(replica: Replica, batch: MicroBatch) -> float:
    """Σ −log p over the targets of `batch`, without gradients and without dropout."""
    replica.seed_dropout(None)
    with torch.no_grad():
        return float(replica.summed_loss(batch.tokens, batch.positions, batch.targets, batch.lengths))
