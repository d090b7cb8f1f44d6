"""The record of a run: metrics, checkpoints and the adapter."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from hetrain.config import TrainingConfig
from hetrain.jobs.files import METRICS_FILE
from hetrain.public.disk import reason_of
from hetrain.public.errors import StorageError
from hetrain.public.settings import ClientSettings
from hetrain.train.checkpoint import (
    Checkpoint,
    Identity,
    TrainerState,
    checkpoint_path,
    checkpoint_steps,
    read_adapter,
    remove_checkpoint,
    write_checkpoint,
)
from hetrain.train.early_stopping import EvaluationState
from hetrain.train.loop import AppliedUpdate
from hetrain.train.metrics import MicroBatchMetrics, metrics_of
from hetrain.train.output_dir import OutputDirectory
from hetrain.train.signals import Stop, never
from hetrain.train.storage import write_when_there_is_room
from hetrain.train.updater import Tensors, Updater

_log = logging.getLogger(__name__)

_RESERVED_ADAPTERS = 4
"""A checkpoint takes three times an adapter's bytes, with the optimizer's two moments."""
_RESERVED_COPIES = 2
"""The tokenizer lies in the checkpoint and beside the adapter."""
_RESERVED_BYTES = 1 << 20


class RunLog:
    """Counts and records the updates of one run. For the thread that applies them.

    Checkpoints are copied between two updates and written by a thread, so that training goes on meanwhile.
    While the disk is full, training pauses. Room for the last adapter and checkpoint is taken beforehand.

    Attributes:
        output: the adapter that was written at the end,
        output_step: and its update.

    Args:
        output: the run's directory.
        updater: owns the adapter; already restored from `checkpoint`.
        write_adapter: writes adapter values into a directory.
        identity: what a run that goes on from a checkpoint must have in common with this one.
        config: when checkpoints are written and how many are kept.
        total_steps: updates that the run will make.
        checkpoint: the one from which the run goes on; None starts anew.

    Raises:
        StorageError: there is no room for adapter and checkpoint.
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
        self.micro_batches = start.micro_batches if start else 0
        self.evaluations = start.evaluations if start else EvaluationState()
        self.output: Tensors = {}
        self.output_step = self.step
        self.rejected = 0
        self.last: MicroBatchMetrics | None = None
        self._begin = time.perf_counter() - (start.elapsed_s if start else 0.0)
        self._output, self._updater, self._write_adapter = output, updater, write_adapter
        self._identity, self._config, self._total_steps = dict(identity), config, total_steps
        self._saved = self.step
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._write_again: Callable[[], None] = lambda: None
        self._wait_s = ClientSettings().disk_wait_s
        self._unwritten: list[MicroBatchMetrics] = []
        self._is_waiting = False
        adapter = sum(value.nbytes for value in updater.snapshot().values.values())
        beside = output.measure(partial(write_adapter, {}))
        output.reserve(_RESERVED_ADAPTERS * adapter + _RESERVED_COPIES * beside + _RESERVED_BYTES)

    @property
    def elapsed_s(self) -> float:
        """Seconds of training, those before a resumed checkpoint included."""
        return time.perf_counter() - self._begin

    def add(self, applied: AppliedUpdate, stop: Stop = never) -> list[MicroBatchMetrics]:
        """Records an update. Returns its metrics.

        Waits while the disk is full, unless `stop` ends that.

        Raises:
            StorageError: something cannot be written, now or after the wait.
        """
        self.skipped_updates += applied.update.is_skipped
        metrics = metrics_of(applied, self._total_steps, self.skipped_updates, self._begin)
        self.step, self.last = applied.update.step, metrics[-1]
        self.tokens += sum(each.tokens for each in metrics)
        self.micro_batches += len(metrics)
        self.rejected += sum(each.rejected for each in metrics)
        self._unwritten += metrics
        self._patiently(self._write_metrics, METRICS_FILE, stop)
        if self._writing is not None and self._writing.done():
            self._finish_writing(stop)
        return metrics

    def note_evaluation(self, evaluations: EvaluationState) -> None:
        """Takes what an evaluation of the last update has shown into the checkpoints from here on."""
        self.evaluations = evaluations
        if self._saved == self.step:  # by a signal meanwhile
            self._saved = -1

    def save_if_due(self, stop: Stop = never) -> None:
        """Writes a checkpoint when it is time, or when the last evaluation was the best one and counts.

        Raises:
            StorageError: as `add`.
        """
        is_regular = self._config.save_steps and self.step % self._config.save_steps == 0
        is_best = self._config.load_best_model_at_end and self.evaluations.best_step == self.step
        if is_regular or is_best:
            self._finish_writing(stop)
            self.checkpoint()

    def checkpoint(self) -> None:
        """Starts to write a checkpoint, unless the last one is of the same update.

        Not while the run waits for room: what it waits for is written then, or at its end.
        """
        if self.step == self._saved or self._is_waiting:
            return
        self._end_writing()
        state = TrainerState(
            identity=self._identity,
            step=self.step,
            skipped_updates=self.skipped_updates,
            micro_batches=self.micro_batches,
            total_steps=self._total_steps,
            tokens=self.tokens,
            elapsed_s=self.elapsed_s,
            schedule=self._updater.schedule_state(),
            evaluations=self.evaluations,
        )
        values, moments = self._updater.snapshot().values, self._updater.optimizer_state()
        self._saved, self._write_again = self.step, partial(self._write, state, values, moments)
        self._writing = self._writer.submit(self._write_again)

    def close(self, *, is_done: bool) -> StorageError | None:
        """Writes the adapter if this run has changed it, into the room that was reserved for it.

        Also a checkpoint of the last update, from which the run can go on: always when it is not done, else
        if any are wanted.

        Args:
            is_done: whether the run has come to its end. Otherwise there is no wait for room.

        Returns:
            Why the adapter could not be written, if so.
        """
        self._end_writing()
        self._output.release_reserve()
        if not is_done or (self._config.save_steps and self.last is not None):
            self.checkpoint()
            self._end_writing()
        self._writer.shutdown()
        if self.last is None:
            return None
        if not is_done:
            self._wait_s = 0
        self.output = self._output_values(is_done=is_done)
        save = partial(self._write_adapter, self.output)
        try:
            self._patiently(partial(self._output.save_adapter, save), "the adapter", never)
        except StorageError as error:
            return error
        try:
            self._write_metrics()
        except OSError as error:
            _log.warning("metrics.jsonl lacks the last updates: %s", reason_of(error))
        return None

    def _output_values(self, *, is_done: bool) -> Tensors:
        """The values of the adapter that is the output, and sets `output_step` to their update."""
        values, best = self._updater.snapshot().values, self.evaluations.best_step
        self.output_step = self.step
        if is_done and self._config.load_best_model_at_end and best not in (0, self.step):
            path = checkpoint_path(self._output.path, best)
            try:
                values = read_adapter(path, values)
                self.output_step = best
            except (OSError, KeyError, SafetensorError) as error:
                _log.error("%s: the best adapter cannot be read, the last one is written: %s", path, error)
        return values

    def _write(self, state: TrainerState, values: Tensors, moments: Tensors) -> None:
        path = self._output.path
        write_checkpoint(path, state, moments, partial(self._write_adapter, values))
        limit, best = self._config.save_total_limit, state.evaluations.best_step
        try:
            for step in checkpoint_steps(path)[:-limit] if limit else ():
                if step != best:
                    remove_checkpoint(path, step)
        except OSError as error:
            _log.warning("an earlier checkpoint could not be removed: %s", reason_of(error))

    def _write_metrics(self) -> None:
        while self._unwritten:
            self._output.add(self._unwritten[0])
            del self._unwritten[0]

    def _finish_writing(self, stop: Stop) -> None:
        """Waits for the checkpoint that is being written, and for room if that is lacking."""
        step = self._saved
        if self._end_writing():
            self._patiently(self._write_again, f"checkpoint-{step}", stop)
            self._saved = step

    def _end_writing(self) -> bool:
        """Waits for the checkpoint that is being written. Returns whether it could not be written."""
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except OSError as error:
            _log.warning("checkpoint-%d could not be written: %s", self._saved, reason_of(error))
            self._saved = -1
            return True
        return False

    def _patiently(self, write: Callable[[], object], what: str, stop: Stop) -> None:
        self._is_waiting = True
        try:
            write_when_there_is_room(write, what, self._wait_s, stop)
        finally:
            self._is_waiting = False
