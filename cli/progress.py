"""How a training run shows itself: a line of figures under a progress bar, or JSON lines, or nothing."""

from __future__ import annotations

import json
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
    TextColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from hetrain.train.finetune import JobResult
    from hetrain.train.output_dir import MicroBatchRecord

_MB = 1e6
_SMOOTHING = 0.8


class TrainingDisplay:
    """Shows records as they come."""

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
            disable=quiet or as_json,
        )
        self._task = self._progress.add_task("preparing", total=None, figures="")
        self._tokens = 0
        self._up = self._down = 0
        self._loss: float | None = None
        self._begin: float | None = None
        self._doing = "training"

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def observe(self, record: MicroBatchRecord, total_steps: int) -> None:
        """See `hetrain.train.finetune.Observer`."""
        if self._json:
            typer.echo(json.dumps({"event": "micro_batch"} | asdict(record)))
            return
        if self._begin is None:  # not zero in a run that goes on from a checkpoint
            self._begin = record.elapsed_s - record.seconds
        self._tokens += record.tokens
        self._up += record.bytes_up
        self._down += record.bytes_down
        past = record.loss if self._loss is None else self._loss
        self._loss = _SMOOTHING * past + (1 - _SMOOTHING) * record.loss
        own = record.seconds - record.encrypt_s - record.wait_s - record.decrypt_s
        rate = self._tokens / (record.elapsed_s - self._begin)
        figures = (
            f"loss {record.loss:.3f} (mean {self._loss:.3f}) · {rate:.0f} tok/s · "
            f"{self._up / _MB:.0f} MB up {self._down / _MB:.0f} down · "
            f"encrypt {record.encrypt_s:.1f}s wait {record.wait_s:.1f}s (worker {record.server_s:.1f}s) "
            f"decrypt {record.decrypt_s:.1f}s own {own:.1f}s"
        )
        self._progress.update(
            self._task, description=self._doing, total=total_steps, completed=record.step, figures=figures
        )
        if not self._console.is_terminal:
            self._console.print(
                f"step {record.step}/{total_steps} {figures}", highlight=False, soft_wrap=True
            )

    def stopping(self) -> None:
        """See `hetrain.train.finetune.Observer`."""
        if self._json:
            typer.echo(json.dumps({"event": "stopping"}))
            return
        self._doing = "stopping"
        self._progress.update(self._task, description=self._doing)
        self._console.print("finishing what is in flight; Ctrl-C again leaves now", highlight=False)

    def summary(self, outcome: JobResult) -> None:
        """Says how it ended."""
        self._console.print(
            f"{outcome.steps} updates over {outcome.tokens} tokens in {outcome.seconds:.0f} s, "
            f"last loss {outcome.last.loss:.3f}. Adapter in {outcome.output_dir}",
            highlight=False,
        )
