"""The display of a run: one line with a bar, or a line now and then in a file, or JSON lines, or nothing."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

import typer
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from cli.console import stderr_console
from cli.progress_line import LineState, is_line_due, largest_share, progress_line
from hetrain.public.disk import where_there_is_room

if TYPE_CHECKING:
    from hetrain.api import Evaluation, JobResult, MicroBatchMetrics

_SMOOTHING = 0.8
_RECENT_UPDATES = 2
_ASCII_BAR = ("#", "-")


class StatusLine:
    """The last line of a terminal, kept up to date; nothing where there is no terminal.

    Attributes:
        state: what it shows.
    """

    def __init__(self, console: Console, state: LineState, *, transient: bool = False) -> None:
        self.state = state
        self._shown_at = time.monotonic()
        self._live = Live(self, console=console, transient=transient, refresh_per_second=4)
        self._is_on = console.is_terminal and not console.quiet

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        left = self.state.seconds_left
        if left is not None:
            left = max(0.0, left - (time.monotonic() - self._shown_at))
        state = replace(self.state, seconds_left=left)
        bar = _ASCII_BAR if options.ascii_only else ("━", "─")
        yield Text(progress_line(state, options.max_width, bar), no_wrap=True, overflow="crop")

    def show(self, state: LineState) -> None:
        """Shows `state` from now on."""
        self.state, self._shown_at = state, time.monotonic()

    def start(self) -> None:
        """Takes the last line."""
        if self._is_on:
            self._live.start()

    def stop(self, *, erase: bool = False) -> None:
        """Leaves the line as it is, or erases it."""
        if self._is_on:
            self._live.transient = self._live.transient or erase
            self._live.stop()


class PreparationDisplay:
    """A line while hints are made, for commands that show nothing else."""

    def __init__(self, *, quiet: bool) -> None:
        self._line = StatusLine(_console(quiet=quiet), LineState("making hints"), transient=True)
        self._began = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._began:
            self._line.stop()

    def on_prepare(self, done: int, total: int) -> None:
        """Shows how many hints are made."""
        self._line.show(replace(self._line.state, done=done, total=total))
        if not self._began:
            self._began = True
            self._line.start()


class TrainingDisplay:
    """Shows metrics as they come."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self._json = as_json
        self._console = _console(quiet=quiet or as_json)
        self._line = StatusLine(self._console, LineState("preparing"))
        self._doing = "training"
        self._training = LineState("training")
        self._tokens, self._loss = 0, math.nan
        self._first: MicroBatchMetrics | None = None
        self._shares: dict[str, float] = {}
        self._workers: dict[str, int] = {}
        self._printed_step, self._printed_at = 0, math.nan

    def __enter__(self) -> Self:
        self._line.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What ends before the first update leaves its error alone on the screen.
        self._line.stop(erase=error is not None and self._first is None)

    def on_prepare(self, done: int, total: int) -> None:
        """Shows how many hints are made."""
        self._show_part("hint", "making hints", done, total)

    def on_evaluating(self, done: int, total: int) -> None:
        """Shows how far an evaluation is."""
        self._show_part("evaluating", "evaluating", done, total)

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Says what an evaluation has come to."""
        if self._json:
            _tell("evaluation", {"step": step} | asdict(evaluation))
            return
        self._say(f"after update {step}: held-out {evaluation}")
        self._line.show(self._training)

    def on_step(self, metrics: MicroBatchMetrics) -> None:
        """Shows the metrics of one micro-batch."""
        if self._json:
            _tell("micro_batch", metrics.record())
            return
        self._take(metrics)
        self._training = self._state(metrics)
        self._line.show(self._training)
        if not self._console.is_terminal:
            self._print(metrics)

    def on_stop(self) -> None:
        """Says that the run will stop."""
        if self._json:
            _tell("stopping", {})
            return
        self._doing = "stopping"
        self._line.show(replace(self._line.state, doing=self._doing))
        self._say("finishing the updates that have begun; Ctrl-C again leaves now")

    def summary(self, result: JobResult) -> None:
        """Says how the run ended."""
        if self._json:
            _tell("done", asdict(result) | {"last": result.last.record()})
            return
        self._say(str(result))

    def _show_part(self, event: str, doing: str, done: int, total: int) -> None:
        if self._json:
            _tell(event, {"done": done, "total": total})
            return
        self._line.show(replace(self._training, doing=doing, done=done, total=total, seconds_left=None))

    def _take(self, metrics: MicroBatchMetrics) -> None:
        """Adds up what the line says of more than one micro-batch."""
        self._first = self._first or metrics
        self._tokens += metrics.tokens
        if math.isfinite(metrics.loss):
            past = metrics.loss if math.isnan(self._loss) else self._loss
            self._loss = _SMOOTHING * past + (1 - _SMOOTHING) * metrics.loss
        for name, seconds in _shares_of(metrics).items():
            self._shares[name] = _SMOOTHING * self._shares.get(name, 0.0) + seconds
        self._workers |= dict.fromkeys(metrics.workers, metrics.step)

    def _state(self, metrics: MicroBatchMetrics) -> LineState:
        assert self._first is not None
        # Neither is zero in a run that goes on from a checkpoint.
        elapsed = metrics.elapsed_s - self._first.begin_s
        updates = metrics.step - self._first.step + 1
        return LineState(
            doing=self._doing,
            done=metrics.step,
            total=metrics.total_steps,
            seconds_left=elapsed / updates * (metrics.total_steps - metrics.step),
            loss=None if math.isnan(self._loss) else self._loss,
            tokens_per_s=self._tokens / elapsed if elapsed > 0 else None,
            waits_for=largest_share(self._shares),
            workers=sum(step > metrics.step - _RECENT_UPDATES for step in self._workers.values()),
        )

    def _print(self, metrics: MicroBatchMetrics) -> None:
        """A line for a file, when one is due and there is none for this update."""
        now = time.monotonic()
        since = None if math.isnan(self._printed_at) else now - self._printed_at
        if metrics.step != self._printed_step and is_line_due(metrics.step, metrics.total_steps, since):
            self._printed_step, self._printed_at = metrics.step, now
            self._say(progress_line(self._training, None))

    def _say(self, text: str) -> None:
        with where_there_is_room():
            self._console.print(text, highlight=False, soft_wrap=True)


def _tell(event: str, figures: Mapping[str, object]) -> None:
    with where_there_is_room():
        typer.echo(json.dumps({"event": event} | dict(figures), default=str))


def _console(*, quiet: bool) -> Console:
    return Console(quiet=True) if quiet else stderr_console()


def _shares_of(metrics: MicroBatchMetrics) -> dict[str, float]:
    """The seconds of a micro-batch by what they were spent on."""
    away = max(metrics.wait_s - metrics.verify_s, 0.0)
    computing = min(metrics.server_s, away)
    protecting = metrics.encrypt_s + metrics.verify_s + metrics.decrypt_s
    own = metrics.seconds - metrics.encrypt_s - metrics.wait_s - metrics.decrypt_s
    return {
        "workers": computing,
        "network": away - computing,
        "encryption": protecting,
        "own layers": max(own, 0.0),
    }
