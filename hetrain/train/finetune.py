"""A training job from data set to adapter."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Protocol

import hetrain
from hetrain.data.packing import MicroBatch, count_micro_batches, epochs
from hetrain.data.tokenization import Row, read_rows
from hetrain.nn.lora import LoraSettings, adapter_parameters, add_adapter
from hetrain.public.errors import DatasetError, Interrupted, UsageError
from hetrain.train.checkpoint import Checkpoint, Identity, find_checkpoint, rows_digest, write_adapter
from hetrain.train.data_position import Position
from hetrain.train.loop import train
from hetrain.train.output_dir import MicroBatchRecord, OutputDirectory
from hetrain.train.run_log import RunLog
from hetrain.train.session import BaseModelFiles, Session, open_base, open_session
from hetrain.train.settings import (
    BatchSettings,
    CheckpointSettings,
    FlightSettings,
    OptimizerSettings,
    OutsourcingSettings,
)
from hetrain.train.signals import stop_on_signals
from hetrain.train.step import share_cores
from hetrain.train.updater import Updater

_VERSIONED = ("torch", "transformers", "peft", "celery", "redis", "numpy", "cryptography")


@dataclass(frozen=True)
class JobSpec:
    """Where a job's parts are: data set, model, broker (None: embedded), client device, output.

    `resume_from` is a checkpoint's directory, ``latest`` for the one in the output directory with the most
    updates, or None to start anew.
    """

    dataset: Path
    model: str
    broker_url: str | None
    device: str
    output_dir: Path
    overwrite: bool = False
    resume_from: str | None = None


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. Updates, epochs and the schedule are counted in optimizer updates."""

    lora: LoraSettings
    optimizer: OptimizerSettings
    batches: BatchSettings
    flight: FlightSettings
    outsourcing: OutsourcingSettings
    checkpoints: CheckpointSettings = field(default_factory=CheckpointSettings)


@dataclass(frozen=True)
class JobResult:
    """How a job ended: updates, tokens, seconds of training, the last record, where the adapter is."""

    steps: int
    total_steps: int
    tokens: int
    seconds: float
    last: MicroBatchRecord
    output_dir: Path


class Observer(Protocol):
    """What a run tells about itself while it lasts."""

    def observe(self, record: MicroBatchRecord, total_steps: int) -> None:
        """Takes every record, and the number of updates that the job will make."""
        ...

    def stopping(self) -> None:
        """Hears that the user has asked to stop, and that the run finishes what is in flight."""
        ...


@dataclass(frozen=True)
class _PreparedJob:
    """What is to be done, checked as far as it can be before workers are asked."""

    base: BaseModelFiles
    rows: list[Row]
    recipe: TrainingConfig
    total_steps: int
    checkpoint: Checkpoint | None

    @property
    def done_steps(self) -> int:
        """Updates that an earlier run has made."""
        return self.checkpoint.state.step if self.checkpoint else 0


def submit(spec: JobSpec, recipe: TrainingConfig, observer: Observer) -> JobResult:
    """Trains an adapter and writes it, metrics.jsonl, job.json and checkpoints to the output directory.

    Raises:
        HetrainError: whatever goes wrong; the data set is checked in whole before anything starts.
        Interrupted: the user stopped it; adapter and checkpoint as they then stood are written.
    """
    base = open_base(spec.model)
    rows = read_rows(spec.dataset, base.tokenizer, recipe.batches.max_length)
    total_steps = count_updates(rows, recipe)
    checkpoint = _checkpoint(spec, _identity(rows, recipe), total_steps)
    prepared = _PreparedJob(base, rows, recipe, total_steps, checkpoint)
    output = OutputDirectory(spec.output_dir, overwrite=spec.overwrite, keep=_kept(checkpoint, spec))
    try:
        with open_session(
            base,
            recipe.outsourcing,
            spec.broker_url,
            spec.device,
            output.log_file,
            micro_batches=(total_steps - prepared.done_steps) * recipe.flight.batches_per_update,
            in_flight=recipe.flight.in_flight,
            max_bytes_in_flight=recipe.flight.max_bytes_in_flight,
        ) as session:
            job = _describe(spec, recipe, session, total_steps, prepared.done_steps)
            return _run(prepared, session, output, job, observer)
    except KeyboardInterrupt:
        raise Interrupted(
            "stopped before the first update; no adapter was written", where=str(output.path)
        ) from None
    finally:
        output.close()


def count_updates(rows: list[Row], recipe: TrainingConfig) -> int:
    """Optimizer updates that the job will make."""
    settings = recipe.batches
    if settings.max_steps > 0:
        return settings.max_steps
    batches = count_micro_batches(rows, settings.micro_batch_tokens, settings.seed, settings.epochs)
    return -(-batches // recipe.flight.batches_per_update)


def _checkpoint(spec: JobSpec, identity: Identity, total_steps: int) -> Checkpoint | None:
    """The checkpoint to go on from, as far as it can be checked before a session is open."""
    if spec.resume_from is None:
        return None
    checkpoint = find_checkpoint(spec.resume_from, spec.output_dir)
    checkpoint.require(identity)
    if checkpoint.state.step >= total_steps:
        raise UsageError(
            f"all {total_steps} updates have been made",
            where=str(checkpoint.path),
            hint="the checkpoint holds the finished adapter",
        )
    return checkpoint


def _kept(checkpoint: Checkpoint | None, spec: JobSpec) -> int | None:
    """Updates whose traces in the output directory are this run's own."""
    if checkpoint is None or checkpoint.path.resolve().parent != spec.output_dir.resolve():
        return None
    return checkpoint.state.step


def _identity(rows: list[Row], recipe: TrainingConfig) -> Identity:
    """What decides the course of a run, but for the plan: all that a resumed one must be given again."""
    outsourcing = recipe.outsourcing
    return {
        **asdict(recipe.lora),
        **asdict(recipe.optimizer),
        **asdict(recipe.batches),
        "engine": outsourcing.engine,
        "activation_bits": outsourcing.activation_bits,
        "outsource": outsourcing.patterns,
        "sync": recipe.flight.sync,
        "batches_per_update": recipe.flight.batches_per_update,
        "data set, by the SHA-256 of its tokens,": rows_digest(rows),
    }


def _run(
    prepared: _PreparedJob,
    session: Session,
    output: OutputDirectory,
    job: dict[str, object],
    observer: Observer,
) -> JobResult:
    recipe, total_steps, checkpoint = prepared.recipe, prepared.total_steps, prepared.checkpoint
    identity = {
        **_identity(prepared.rows, recipe),
        "plan, by its SHA-256,": session.split.plan.digest,
    }
    if checkpoint is not None:
        checkpoint.require(identity)
    seed = recipe.batches.seed
    model = add_adapter(session.split, recipe.lora, seed)
    updater = Updater(adapter_parameters(model), recipe.optimizer, total_steps)
    if checkpoint is not None:
        checkpoint.restore(updater)
    output.write_job(job | {"status": "running"})
    writer = partial(write_adapter, model, prepared.base.reference)
    run_log = RunLog(output, updater, writer, identity, recipe.checkpoints, checkpoint)
    share_cores(recipe.flight.in_flight)
    replicas = session.replicas(model, recipe.flight.in_flight)
    batches = _draw(prepared.rows, recipe, total_steps, run_log.position)

    def stopping() -> None:
        observer.stopping()
        run_log.checkpoint()  # already now: whoever sent the signal may not wait for long

    status, saved = "failed", None
    try:
        with (
            stop_on_signals(stopping) as stop,
            closing(
                train(updater, replicas, batches, recipe.flight, seed, session.channel.close, stop)
            ) as course,
        ):
            for applied in course:
                for record in run_log.add(applied):
                    observer.observe(record, total_steps)
        status = "done" if run_log.step == total_steps else "interrupted"
    except KeyboardInterrupt:
        status = "interrupted"
    finally:
        if status != "done":
            run_log.checkpoint()
        saved = run_log.close()
        output.write_job(job | {"status": status, "steps": run_log.step, "tokens": run_log.tokens})
    if run_log.last is None:
        if status == "interrupted":
            raise KeyboardInterrupt
        raise DatasetError("the data set made no micro-batch")
    if status == "interrupted":
        raise _interrupted(run_log.step, total_steps, saved, output.path)
    return JobResult(run_log.step, total_steps, run_log.tokens, run_log.elapsed_s, run_log.last, output.path)


def _interrupted(step: int, total_steps: int, saved: Path | None, output: Path) -> Interrupted:
    text = f"stopped after {step} of {total_steps} updates; the adapter as it stood was written"
    if saved is None:
        return Interrupted(f"{text}, but no checkpoint", where=str(output))
    return Interrupted(
        f"{text}, and {saved.name}",
        where=str(output),
        hint="Go on with the same command and --resume-from-checkpoint latest",
    )


def _draw(rows: list[Row], recipe: TrainingConfig, total_steps: int, done: Position) -> Iterator[MicroBatch]:
    settings = recipe.batches
    n_epochs = None if settings.max_steps > 0 else settings.epochs
    drawn = epochs(rows, settings.micro_batch_tokens, settings.seed, n_epochs)
    wanted = islice(drawn, total_steps * recipe.flight.batches_per_update)
    return (batch for batch in wanted if batch.index not in done)


def _describe(
    spec: JobSpec, recipe: TrainingConfig, session: Session, total_steps: int, done_steps: int
) -> dict[str, object]:
    """job.json: everything needed to say what ran, and no secret: the broker's URL stays out."""
    return {
        "hetrain": hetrain.__version__,
        "model": spec.model,
        "dataset": str(spec.dataset),
        "engine": recipe.outsourcing.engine,
        "broker": "embedded" if spec.broker_url is None else "given",
        "device": spec.device,
        "plan_digest": session.split.plan.digest,
        "worker": {"name": session.worker.worker, "device": session.worker.device},
        "total_steps": total_steps,
        "resumed_at": done_steps,
        "recipe": asdict(recipe),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in _VERSIONED},
    }
