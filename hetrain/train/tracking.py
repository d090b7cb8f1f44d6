"""Losses and rates for TensorBoard and W&B. Neither rows nor names of data sets nor paths are among them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from hetrain.public.errors import UsageError

if TYPE_CHECKING:
    from hetrain.train.evaluation import Evaluation
    from hetrain.train.metrics import MicroBatchMetrics

RUNS_DIRECTORY = "runs"

_log = logging.getLogger(__name__)

Settings = Mapping[str, object]


class _Writer(Protocol):
    """Takes figures to where they are shown."""

    @property
    def failures(self) -> tuple[type[Exception], ...]: ...
    def write(self, figures: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, output: Path, settings: Settings, done_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        directory = str(output / RUNS_DIRECTORY)
        self._writer = SummaryWriter(directory, purge_step=done_steps + 1 if done_steps else None)

    def write(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, output: Path, settings: Settings, done_steps: int) -> None:
        import wandb

        self.failures: tuple[type[Exception], ...] = (OSError, wandb.Error)
        try:
            self._run = wandb.init(dir=str(output), name=output.name, config=dict(settings))
        except self.failures as error:
            raise UsageError(
                f"wandb does not start: {error}", field="report_to", hint="log in with `wandb login`"
            ) from error

    def write(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


_WRITERS: Mapping[str, Callable[[Path, Settings, int], _Writer]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
}


def require_trackers(names: Sequence[str]) -> None:
    """Raises `UsageError` unless the packages that `names` need are installed."""
    for name in names:
        if name in _WRITERS and find_spec(name) is None:
            raise UsageError(
                f"{name} is not installed",
                field="report_to",
                hint=f"`pip install {name}`, or leave it out: metrics.jsonl has every figure",
            )


@dataclass
class Tracker:
    """Reports to several places; one that fails is warned of and given up."""

    writers: list[_Writer]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self.writers:
            self._try(writer, writer.close)

    def update(self, metrics: Sequence[MicroBatchMetrics]) -> None:
        """Reports an update: `metrics` are those of its micro-batches."""
        last, targets = metrics[-1], sum(each.targets for each in metrics)
        self._write(
            {
                "train/loss": sum(each.loss * each.targets for each in metrics) / targets,
                "train/learning_rate": last.learning_rate,
                "train/grad_norm": last.grad_norm,
                "train/staleness": float(max(each.staleness for each in metrics)),
                "train/tokens": float(last.update_tokens),
            },
            last.step,
        )

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Reports an evaluation of the adapter of update `step`."""
        self._write({"eval/loss": evaluation.loss, "eval/perplexity": evaluation.perplexity}, step)

    def _write(self, figures: Mapping[str, float], step: int) -> None:
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        for writer in list(self.writers):
            self._try(writer, lambda writer=writer: writer.write(finite, step))  # type: ignore[misc]

    def _try(self, writer: _Writer, call: Callable[[], None]) -> None:
        try:
            call()
        except writer.failures as error:
            _log.warning("nothing more is reported to %s: %s", type(writer).__name__.strip("_"), error)
            self.writers = [each for each in self.writers if each is not writer]


def open_tracker(names: Sequence[str], output: Path, settings: Settings, done_steps: int = 0) -> Tracker:
    """A tracker for a run.

    Args:
        names: of `TrainingConfig.report_to`.
        output: the run's directory.
        settings: what W&B shows beside the figures.
        done_steps: updates that an earlier run has made; what TensorBoard has after them is dropped.

    Raises:
        UsageError: W&B does not start.
    """
    return Tracker([_WRITERS[name](output, settings, done_steps) for name in names if name in _WRITERS])
