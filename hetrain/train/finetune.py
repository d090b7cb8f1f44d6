"""A training job from data set to adapter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial

from peft import PeftModel

from hetrain.config import JobSpec
from hetrain.data.dataset import JobRows
from hetrain.data.prompts import prompt_template
from hetrain.data.updates import draw, epoch_ends
from hetrain.jobs.run import recorded_run
from hetrain.nn.adapter_files import write_adapter
from hetrain.nn.lora import add_adapter
from hetrain.nn.replica import Replica
from hetrain.public.errors import DatasetError, Interrupted, StorageError
from hetrain.public.model.files import public_name
from hetrain.train.callbacks import Callbacks
from hetrain.train.early_stopping import EvaluationState
from hetrain.train.evaluation import Evaluation, Evaluator
from hetrain.train.job_record import describe, write_card, write_job
from hetrain.train.loop import train
from hetrain.train.metrics import MicroBatchMetrics
from hetrain.train.outcome import JobResult, interrupted, stored_in_part
from hetrain.train.output_dir import OutputDirectory
from hetrain.train.prepared_job import PreparedJob, make_updater, prepare_job
from hetrain.train.records import add_evaluation
from hetrain.train.run_log import RunLog
from hetrain.train.session import Session, open_session
from hetrain.train.signals import Stop, restored_handlers, stop_on_signals
from hetrain.train.step import share_cores
from hetrain.train.tracking import Tracker, open_tracker
from hetrain.train.updater import Updater
from hetrain.train.validation import Validation

_log = logging.getLogger(__name__)

_NO_CALLBACKS = Callbacks()


@restored_handlers()
def finetune(spec: JobSpec, raw_rows: JobRows, callbacks: Callbacks = _NO_CALLBACKS) -> JobResult:
    """Trains an adapter and writes it, metrics.jsonl, job.json and checkpoints to the output directory.

    Args:
        spec: the job.
        raw_rows: the rows of its data set.
        callbacks: what to call meanwhile.

    Raises:
        HetrainError: whatever goes wrong; all rows are tokenized before anything starts.
        Interrupted: the user stopped it; adapter and checkpoint as they then stood are written.
    """
    job = prepare_job(spec, raw_rows)
    output = OutputDirectory(spec.output_dir, overwrite=spec.overwrite_output_dir, keep=job.kept_steps)
    try:
        with (
            recorded_run(spec, is_resumed=job.kept_steps is not None, on_start=callbacks.on_start) as run,
            open_session(
                job.base,
                spec.outsourcing,
                spec.workers,
                spec.device,
                output.log_file,
                on_prepare=run.before(callbacks.on_prepare),
                in_flight=spec.training.replicas,
                max_bytes_in_flight=spec.training.max_bytes_in_flight,
                tokens=max(spec.training.tokens_per_micro_batch, spec.training.evaluation_tokens),
            ) as session,
            open_tracker(
                spec.training.report_to, output.path, _tracked_settings(spec), job.start.updates
            ) as tracker,
        ):
            run.starts()
            stopping = partial(run.stops, callbacks.on_stop)
            return _run(job, session, output, replace(callbacks, on_stop=stopping), tracker)
    except KeyboardInterrupt:
        raise Interrupted(
            "stopped before the first update; no adapter was written", where=str(output.path)
        ) from None
    finally:
        output.close()


def _run(
    job: PreparedJob, session: Session, output: OutputDirectory, callbacks: Callbacks, tracker: Tracker
) -> JobResult:
    spec, config = job.spec, job.training
    identity = {**job.identity, "plan_sha256": session.split.plan.digest}
    if job.checkpoint is not None:
        job.checkpoint.require(identity)
    model = add_adapter(session.split, spec.lora, spec.training.seed)
    updater = make_updater(job, model)
    writer = partial(write_adapter, model, public_name(spec.model), job.base.tokenizer)
    run_log = RunLog(output, updater, writer, identity, config, job.total_steps, job.checkpoint)
    validation = _validation(job, session, model, callbacks)
    run = _Run(job, output, callbacks, tracker, updater, run_log, validation, _description(job, session))
    write_job(output, {**run.description, "status": "running"})
    share_cores(config.replicas)
    replicas = session.replicas(model, config.replicas, config.activation_memory)
    status = "failed"
    failure: StorageError | None = None
    try:
        status = run.train(replicas, session.channel.close)
    except KeyboardInterrupt:
        status = "interrupted"
    except StorageError as error:
        failure = error
    finally:
        lost = run.close(status)
    if problem := failure or lost:
        raise stored_in_part(problem, run_log.step, output.path, has_adapter=lost is None)
    if run_log.last is None:
        if status == "interrupted":
            raise KeyboardInterrupt
        raise DatasetError("the data set made no micro-batch")
    if status == "interrupted":
        raise interrupted(run_log.step, job.total_steps, output.path)
    return run.result(run_log.last)


@dataclass(frozen=True)
class _Run:
    """A job that has found its workers."""

    job: PreparedJob
    output: OutputDirectory
    callbacks: Callbacks
    tracker: Tracker
    updater: Updater
    run_log: RunLog
    validation: Validation
    description: Mapping[str, object]

    def train(self, replicas: Sequence[Replica], abort: Callable[[], None]) -> str:
        """Trains to the end, or until a signal. Returns the status; raises as `train`."""
        job, run_log, config = self.job, self.run_log, self.job.training
        batches = draw(job.rows, config, job.total_steps, job.start)
        with stop_on_signals(self._stopping) as stop:
            self._evaluate_if_due(stop)  # a run that was stopped may have missed it

            def ends() -> bool:
                # At least one update: without any there would be nothing to report.
                return stop() or (self.validation.is_over and run_log.last is not None)

            with closing(train(self.updater, replicas, batches, config, abort, ends)) as course:
                for applied in course:
                    metrics = run_log.add(applied, stop)
                    self.tracker.update(metrics)
                    for each in metrics:
                        self.callbacks.on_step(each)
                    self._evaluate_if_due(stop)
                    run_log.save_if_due(stop)
        return "done" if run_log.step == job.total_steps or self.validation.is_over else "interrupted"

    def close(self, status: str) -> StorageError | None:
        """Writes the adapter, job.json and the model card. Returns why the adapter could not be written."""
        if lost := self.run_log.close(is_done=status == "done"):
            _log.error("%s", lost)
        write_job(self.output, self._record("failed" if lost else status))
        if self.run_log.last is not None:
            write_card(self.output)
        return lost

    def result(self, last: MicroBatchMetrics) -> JobResult:
        """The figures of a run that is done, with the evaluation of its output."""
        run_log, step = self.run_log, self.run_log.output_step
        was_evaluated = step in self.validation.made
        evaluation = self.validation.of_output(step, run_log.output)
        if evaluation is not None:
            write_job(self.output, self._record("done") | {"evaluation": asdict(evaluation)})
            if not was_evaluated:
                self._note(step, evaluation)
        return JobResult(
            steps=run_log.step,
            total_steps=self.job.total_steps,
            tokens=run_log.tokens,
            skipped_updates=run_log.skipped_updates,
            rejected=run_log.rejected,
            seconds=run_log.elapsed_s,
            last=last,
            output_dir=self.output.path,
            adapter_step=step,
            evaluation=evaluation,
        )

    def _stopping(self) -> None:
        self.callbacks.on_stop()
        self.run_log.checkpoint()  # already now: the process may be killed soon after the signal

    def _evaluate_if_due(self, stop: Stop) -> None:
        step = self.run_log.step
        if self.validation.is_due(step):
            evaluation = self.validation.evaluate(step, self.updater.snapshot().values, stop)
            self.run_log.note_evaluation(self.validation.state)
            self._note(step, evaluation)

    def _note(self, step: int, evaluation: Evaluation) -> None:
        """Records an evaluation, and reports it."""
        names = self.job.spec.data.eval_dataset or ("validation split",)
        add_evaluation(self.output.path, names, asdict(evaluation), step)
        self.tracker.evaluation(step, evaluation)

    def _record(self, status: str) -> dict[str, object]:
        """job.json at the end of the run."""
        return {
            **self.description,
            "status": status,
            "steps": self.run_log.step,
            "adapter_step": self.run_log.output_step,
            "tokens": self.run_log.tokens,
        }


def _tracked_settings(spec: JobSpec) -> dict[str, object]:
    """What W&B shows of a job: no names of data sets, no paths."""
    return {"model": public_name(spec.model), **asdict(spec.lora), **asdict(spec.training)}


def _validation(job: PreparedJob, session: Session, model: PeftModel, callbacks: Callbacks) -> Validation:
    config, evaluator, ends = job.training, None, frozenset[int]()
    if job.held_out:
        evaluator = Evaluator(session, model, job.held_out, config)
    if config.eval_strategy == "epoch":
        ends = epoch_ends(job.rows, config, job.total_steps, job.start)
    state = job.checkpoint.state.evaluations if job.checkpoint else EvaluationState()
    return Validation(evaluator, config, job.total_steps, ends, state, callbacks)


def _description(job: PreparedJob, session: Session) -> dict[str, object]:
    """What job.json says of the job, whatever becomes of it."""
    return describe(job.spec, job.base, session) | {
        "prompt": asdict(prompt_template(job.rows, job.base.tokenizer)),
        "total_steps": job.total_steps,
        "resumed_at": job.start.updates,
    }
