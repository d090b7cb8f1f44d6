"""The record of a run: metrics, checkpoints and the adapter."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from hetrain.config import TrainingConfig
from hetrain.train.checkpoint import (
    Checkpoint,
    Identity,
    TrainerState,
    checkpoint_path,
    checkpoint_steps,
    remove_checkpoint,
    write_checkpoint,
)
from hetrain.train.loop import AppliedUpdate
from hetrain.train.metrics import MicroBatchMetrics, metrics_of
from hetrain.train.output_dir import OutputDirectory
from hetrain.train.updater import Tensors, Updater

_log = logging.getLogger(__name__)


class RunLog:
    """Counts and records the updates of one run. For the thread that applies them.

    Checkpoints are copied between two updates and written by a thread, so that training goes on meanwhile.
    One that cannot be written is a warning, not the end of a run whose adapter is still in memory.

    Args:
        output: the run's directory.
        updater: owns the adapter; already restored from `checkpoint`.
        write_adapter: writes adapter values into a directory.
        identity: what a run that goes on from a checkpoint must have in common with this one.
        config: when checkpoints are written and how many are kept.
        total_steps: updates that the run will make.
        checkpoint: the one from which the run goes on; None starts anew.
    """

    def __init__(
        self,
        output: OutputDirectory,
        updater: Updater,
        write_adapter: Callable[[Tensors, Path], None],
        identity: Identity,
        config: TrainingConfig,
        total_steps: int,
        checkpoint: Checkpoint | None,
    ) -> None:
        start = checkpoint.state if checkpoint else None
        self.tokens = start.tokens if start else 0
        self.step = start.step if start else 0
        self.skipped_updates = start.skipped_updates if start else 0
        self.rejected = 0
        self.last: MicroBatchMetrics | None = None
        self._begin = time.perf_counter() - (start.elapsed_s if start else 0.0)
        self._output, self._updater, self._write_adapter = output, updater, write_adapter
        self._identity, self._config, self._total_steps = dict(identity), config, total_steps
        self._saved = self.step
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds of training, those before a resumed checkpoint included."""
        return time.perf_counter() - self._begin

    def add(self, applied: AppliedUpdate) -> list[MicroBatchMetrics]:
        """Records an update, and writes a checkpoint when one is due. Returns the update's metrics."""
        self.skipped_updates += applied.update.is_skipped
        metrics = metrics_of(applied, self._total_steps, self.skipped_updates, self._begin)
        for each in metrics:
            self._output.add(each)
        self.step, self.last = applied.update.step, metrics[-1]
        self.tokens += sum(each.tokens for each in metrics)
        self.rejected += sum(each.rejected for each in metrics)
        if self._config.save_steps and self.step % self._config.save_steps == 0:
            self.checkpoint()
        return metrics

    def checkpoint(self) -> None:
        """Starts to write a checkpoint, unless there has been no update since the last one."""
        if self.step == self._saved:
            return
        self._finish_writing()
        self._saved = self.step
        state = TrainerState(
            identity=self._identity,
            step=self.step,
            skipped_updates=self.skipped_updates,
            tokens=self.tokens,
            elapsed_s=self.elapsed_s,
            schedule=self._updater.schedule_state(),
        )
        values, moments = self._updater.snapshot().values, self._updater.optimizer_state()
        self._writing = self._writer.submit(self._write, state, values, moments)

    def close(self) -> Path | None:
        """Writes the adapter if this run has changed it. Returns the last update's checkpoint, if any."""
        try:
            self._finish_writing()
        finally:
            self._writer.shutdown()
            if self.last is not None:
                self._output.save_adapter(partial(self._write_adapter, self._updater.snapshot().values))
        path = checkpoint_path(self._output.path, self.step)
        return path if path.is_dir() else None

    def _write(self, state: TrainerState, values: Tensors, moments: Tensors) -> None:
        path = self._output.path
        write_checkpoint(path, state, moments, partial(self._write_adapter, values))
        limit = self._config.save_total_limit
        for step in checkpoint_steps(path)[:-limit] if limit else ():
            remove_checkpoint(path, step)

    def _finish_writing(self) -> None:
        if self._writing is None:
            return
        try:
            self._writing.result()
        except OSError as error:
            _log.warning("a checkpoint could not be written: %s", error)
        self._writing = None
