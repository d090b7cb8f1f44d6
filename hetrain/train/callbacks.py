"""What a job calls while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hetrain.train.evaluation import Evaluation
from hetrain.train.metrics import MicroBatchMetrics


def _ignore(*arguments: object) -> None:
    """Does nothing."""


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """Called by the thread that trains.

    Attributes:
        on_step: gets the metrics of every micro-batch of an update.
        on_stop: called when a signal has asked the run to stop, before it finishes what is in flight.
        on_prepare: gets the number of hints that are made and to be made, after each.
        on_evaluating: gets the number of micro-batches of an evaluation that are computed and to be computed.
        on_evaluation: gets the update after which the held-out rows were evaluated, and the result.
        on_start: gets the job's id once workers have agreed to its plan.
    """

    on_step: Callable[[MicroBatchMetrics], object] = _ignore
    on_stop: Callable[[], object] = _ignore
    on_prepare: Callable[[int, int], object] = _ignore
    on_evaluating: Callable[[int, int], object] = _ignore
    on_evaluation: Callable[[int, Evaluation], object] = _ignore
    on_start: Callable[[str], object] = _ignore
