"""A training job from data set to adapter."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice

from hetrain.config import JobSpec, TrainingConfig
from hetrain.data.dataset import JobRows
from hetrain.data.packing import MicroBatch, epochs
from hetrain.data.prompts import prompt_template
from hetrain.data.tokenization import Row, tokenize_rows
from hetrain.data.updates import count_updates
from hetrain.jobs.run import recorded_run
from hetrain.nn.adapter_files import write_adapter
from hetrain.nn.lora import adapter_parameters, add_adapter
from hetrain.public.errors import DatasetError, Interrupted, StorageError, UsageError
from hetrain.public.model.files import public_name
from hetrain.train.checkpoint import (
    Checkpoint,
    Identity,
    find_checkpoint,
    rows_digest,
)
from hetrain.train.evaluation import evaluate_rows
from hetrain.train.hints import OnPrepare, ignore_progress
from hetrain.train.job_record import describe, write_card, write_job
from hetrain.train.loop import train
from hetrain.train.metrics import MicroBatchMetrics
from hetrain.train.outcome import JobResult, interrupted, stored_in_part
from hetrain.train.output_dir import OutputDirectory
from hetrain.train.records import add_evaluation
from hetrain.train.run_log import RunLog
from hetrain.train.session import BaseModelFiles, Session, open_base, open_session
from hetrain.train.signals import restored_handlers, stop_on_signals
from hetrain.train.step import share_cores
from hetrain.train.updater import Updater

_log = logging.getLogger(__name__)

# Settings that a resumed run may change: they decide neither what is computed nor in which micro-batches.
_FREE = (
    "verify_rows",
    "in_flight",
    "max_bytes_in_flight",
    "max_skipped_updates",
    "save_steps",
    "save_total_limit",
)


@dataclass(frozen=True)
class _PreparedJob:
    """A job, checked as far as it can be without workers."""

    spec: JobSpec
    base: BaseModelFiles
    rows: list[Row]
    held_out: list[Row]
    total_steps: int
    checkpoint: Checkpoint | None

    @property
    def done_steps(self) -> int:
        """Updates that an earlier run has made."""
        return self.checkpoint.state.step if self.checkpoint else 0


@restored_handlers()
def finetune(
    spec: JobSpec,
    raw_rows: JobRows,
    on_step: Callable[[MicroBatchMetrics], object] = lambda metrics: None,
    on_stop: Callable[[], object] = lambda: None,
    on_prepare: OnPrepare = ignore_progress,
    on_start: Callable[[str], object] = lambda job_id: None,
) -> JobResult:
    """Trains an adapter and writes it, metrics.jsonl, job.json and checkpoints to the output directory.

    Args:
        spec: the job.
        raw_rows: the rows of its data set.
        on_step: called with the metrics of every micro-batch of an update.
        on_stop: called when a signal has asked the run to stop, before it finishes what is in flight.
        on_prepare: called with the number of hints that are made and to be made, after each.
        on_start: called with the job's id once workers have agreed to its plan.

    Raises:
        HetrainError: whatever goes wrong; all rows are tokenized before anything starts.
        Interrupted: the user stopped it; adapter and checkpoint as they then stood are written.
    """
    base = open_base(spec.model)
    rows, held_out = (
        tokenize_rows(raw, base.tokenizer, spec.training.longest_row, spec.data) if raw else []
        for raw in (raw_rows.learned, raw_rows.held_out)
    )
    total_steps = count_updates(rows, spec.training)
    if warning := spec.training.warning(total_steps):
        _log.warning(warning)
    checkpoint = _checkpoint(spec, _identity(spec, rows), total_steps)
    job = _PreparedJob(spec, base, rows, held_out, total_steps, checkpoint)
    kept = _kept(checkpoint, spec)
    output = OutputDirectory(spec.output_dir, overwrite=spec.overwrite_output_dir, keep=kept)
    try:
        with (
            recorded_run(spec, is_resumed=kept is not None, on_start=on_start) as run,
            open_session(
                base,
                spec.outsourcing,
                spec.workers,
                spec.device,
                output.log_file,
                on_prepare=run.before(on_prepare),
                in_flight=spec.training.replicas,
                max_bytes_in_flight=spec.training.max_bytes_in_flight,
                tokens=spec.training.tokens_per_micro_batch,
            ) as session,
        ):
            run.starts()
            return _run(job, session, output, on_step, partial(run.stops, on_stop))
    except KeyboardInterrupt:
        raise Interrupted(
            "stopped before the first update; no adapter was written", where=str(output.path)
        ) from None
    finally:
        output.close()


def _checkpoint(spec: JobSpec, identity: Identity, total_steps: int) -> Checkpoint | None:
    """The checkpoint to go on from, as far as it can be checked before a session is open."""
    if spec.resume_from_checkpoint is None:
        return None
    checkpoint = find_checkpoint(spec.resume_from_checkpoint, spec.output_dir)
    checkpoint.require(identity)
    if checkpoint.state.step >= total_steps:
        raise UsageError(
            f"all {total_steps} updates have been made",
            where=str(checkpoint.path),
            hint="the checkpoint holds the finished adapter",
        )
    return checkpoint


def _kept(checkpoint: Checkpoint | None, spec: JobSpec) -> int | None:
    """The last update whose files in the output directory are this run's own."""
    if checkpoint is None or checkpoint.path.resolve().parent != spec.output_dir.resolve():
        return None
    return checkpoint.state.step


def _identity(spec: JobSpec, rows: list[Row]) -> Identity:
    """What decides the course of a run, but for the plan: a resumed run must have the same."""
    settings = {**asdict(spec.lora), **asdict(spec.training), **asdict(spec.outsourcing)}
    return {
        **{name: value for name, value in settings.items() if name not in _FREE},
        "dataset_sha256": rows_digest(rows),
    }


def _run(
    job: _PreparedJob,
    session: Session,
    output: OutputDirectory,
    on_step: Callable[[MicroBatchMetrics], object],
    on_stop: Callable[[], object],
) -> JobResult:
    spec, total_steps, checkpoint, config = job.spec, job.total_steps, job.checkpoint, job.spec.training
    identity = {**_identity(spec, job.rows), "plan_sha256": session.split.plan.digest}
    if checkpoint is not None:
        checkpoint.require(identity)
    model = add_adapter(session.split, spec.lora, config.seed)
    updater = Updater(adapter_parameters(model), config, total_steps)
    if checkpoint is not None:
        checkpoint.restore(updater)
    writer = partial(write_adapter, model, public_name(spec.model), job.base.tokenizer)
    run_log = RunLog(output, updater, writer, identity, config, total_steps, checkpoint)
    description = _description(job, session)
    write_job(output, description | {"status": "running"})
    share_cores(config.replicas)
    replicas = session.replicas(model, config.replicas)
    batches = _draw(job.rows, config, job.done_steps, total_steps)

    def stopping() -> None:
        on_stop()
        run_log.checkpoint()  # already now: the process may be killed soon after the signal

    status = "failed"
    failure: StorageError | None = None
    try:
        with (
            stop_on_signals(stopping) as stop,
            closing(train(updater, replicas, batches, config, session.channel.close, stop)) as course,
        ):
            for applied in course:
                for metrics in run_log.add(applied, stop):
                    on_step(metrics)
        status = "done" if run_log.step == total_steps else "interrupted"
    except KeyboardInterrupt:
        status = "interrupted"
    except StorageError as error:
        failure = error
    finally:
        if lost := run_log.close(is_done=status == "done"):
            _log.error("%s", lost)
            status = "failed"
        end = {"status": status, "steps": run_log.step, "tokens": run_log.tokens}
        write_job(output, description | end)
        if run_log.last is not None:
            write_card(output)
    if problem := failure or lost:
        raise stored_in_part(problem, run_log.step, output.path, has_adapter=lost is None)
    if run_log.last is None:
        if status == "interrupted":
            raise KeyboardInterrupt
        raise DatasetError("the data set made no micro-batch")
    if status == "interrupted":
        raise interrupted(run_log.step, total_steps, output.path)
    result = JobResult(
        run_log.step,
        total_steps,
        run_log.tokens,
        run_log.skipped_updates,
        run_log.rejected,
        run_log.elapsed_s,
        run_log.last,
        output.path,
    )
    if not job.held_out:
        return result
    evaluation = evaluate_rows(session, model, job.held_out, config)
    figures = asdict(evaluation)
    write_job(output, description | end | {"evaluation": figures})
    add_evaluation(output.path, spec.data.eval_dataset or ("validation split",), figures)
    return replace(result, evaluation=evaluation)


def _draw(rows: list[Row], config: TrainingConfig, done: int, total: int) -> Iterator[MicroBatch]:
    """The micro-batches of updates `done` to `total`."""
    n_epochs = None if config.max_steps > 0 else math.ceil(config.num_train_epochs)
    drawn = epochs(rows, config.tokens_per_micro_batch, config.seed, n_epochs)
    return islice(drawn, done * config.batches_per_update, total * config.batches_per_update)


def _description(job: _PreparedJob, session: Session) -> dict[str, object]:
    """What job.json says of the job, whatever becomes of it."""
    return describe(job.spec, job.base, session) | {
        "prompt": asdict(prompt_template(job.rows, job.base.tokenizer)),
        "total_steps": job.total_steps,
        "resumed_at": job.done_steps,
    }
