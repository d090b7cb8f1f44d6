"""The display of a training run: figures beside a progress bar, or JSON lines, or nothing."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Self

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from hetrain.api import JobResult, MicroBatchMetrics

_MB = 1e6
_SMOOTHING = 0.8


class PreparationDisplay:
    """A progress bar while hints are made."""

    def __init__(self, *, quiet: bool) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_prepare(self, done: int, total: int) -> None:
        """Shows how many hints are made."""
        if self._task is None:
            self._task = self._progress.add_task("making hints", total=total)
        self._progress.update(self._task, completed=done)


class TrainingDisplay:
    """Shows metrics as they come."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self._json = as_json
        self._console = Console(stderr=True, quiet=quiet or as_json)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            disable=quiet or as_json or not self._console.is_terminal,
        )
        self._task = self._progress.add_task("preparing", total=None, figures="")
        self._tokens = 0
        self._up = self._down = 0
        self._loss = math.nan
        self._begin: float | None = None
        self._doing = "training"

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What ends before the first update leaves its error alone on the screen.
        self._progress.live.transient = error is not None and self._begin is None
        self._progress.stop()

    def on_prepare(self, done: int, total: int) -> None:
        """Shows how many hints are made."""
        if self._json:
            typer.echo(json.dumps({"event": "hint", "done": done, "total": total}))
            return
        self._progress.update(self._task, description="making hints", completed=done, total=total)

    def on_step(self, metrics: MicroBatchMetrics) -> None:
        """Shows the metrics of one micro-batch."""
        if self._json:
            typer.echo(json.dumps({"event": "micro_batch"} | metrics.record()))
            return
        if self._begin is None:  # not zero in a run that goes on from a checkpoint
            self._begin = metrics.elapsed_s - metrics.seconds
        self._tokens += metrics.tokens
        self._up += metrics.bytes_up
        self._down += metrics.bytes_down
        if math.isfinite(metrics.loss):
            past = metrics.loss if math.isnan(self._loss) else self._loss
            self._loss = _SMOOTHING * past + (1 - _SMOOTHING) * metrics.loss
        own = metrics.seconds - metrics.encrypt_s - metrics.wait_s - metrics.decrypt_s
        rate = self._tokens / (metrics.elapsed_s - self._begin)
        figures = (
            f"loss {metrics.loss:.3f} (mean {self._loss:.3f}) · {metrics.update_tokens} tok/update, "
            f"staleness {metrics.staleness} · {rate:.0f} tok/s · "
            f"{self._up / _MB:.0f} MB up {self._down / _MB:.0f} down · "
            f"encrypt {metrics.encrypt_s:.1f}s wait {metrics.wait_s:.1f}s (worker {metrics.server_s:.1f}s, "
            f"verify {metrics.verify_s:.1f}s) decrypt {metrics.decrypt_s:.1f}s own {own:.1f}s"
        )
        self._progress.update(
            self._task,
            description=self._doing,
            total=metrics.total_steps,
            completed=metrics.step,
            figures=figures,
        )
        if not self._console.is_terminal:
            self._console.print(
                f"step {metrics.step}/{metrics.total_steps} {figures}", highlight=False, soft_wrap=True
            )

    def on_stop(self) -> None:
        """Says that the run will stop."""
        if self._json:
            typer.echo(json.dumps({"event": "stopping"}))
            return
        self._doing = "stopping"
        self._progress.update(self._task, description=self._doing)
        self._console.print("finishing the updates that have begun; Ctrl-C again leaves now", highlight=False)

    def summary(self, result: JobResult) -> None:
        """Says how the run ended."""
        if self._json:
            figures = asdict(result) | {"last": result.last.record()}
            typer.echo(json.dumps({"event": "done"} | figures, default=str))
            return
        self._console.print(str(result), highlight=False)
