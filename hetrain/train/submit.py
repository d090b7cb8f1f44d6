"""A training job from data set to adapter."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import hetrain
from hetrain.nn.lora import LoraSettings, adapter_parameters, add_adapter
from hetrain.public.errors import DatasetError, Interrupted
from hetrain.train.loop import train
from hetrain.train.packing import MicroBatch, count_micro_batches, epochs
from hetrain.train.records import MicroBatchRecord, OutputDirectory, records_of
from hetrain.train.rows import Row, read_rows
from hetrain.train.session import Base, Session, open_base, open_session
from hetrain.train.settings import BatchSettings, FlightSettings, OptimizerSettings, OutsourcingSettings
from hetrain.train.step import share_cores
from hetrain.train.updates import Updater

_VERSIONED = ("torch", "transformers", "peft", "celery", "redis", "numpy", "cryptography")


@dataclass(frozen=True)
class Place:
    """Where a job's parts are: data set, model, broker (None: embedded), client device, output."""

    dataset: Path
    model: str
    broker_url: str | None
    device: str
    output_dir: Path
    overwrite: bool = False


@dataclass(frozen=True)
class Recipe:
    """How to train."""

    lora: LoraSettings
    optimizer: OptimizerSettings
    batches: BatchSettings
    flight: FlightSettings
    outsourcing: OutsourcingSettings


@dataclass(frozen=True)
class Outcome:
    """How a job ended: updates, tokens, seconds of training, the last record, where the adapter is."""

    steps: int
    total_steps: int
    tokens: int
    seconds: float
    last: MicroBatchRecord
    output_dir: Path


Observer = Callable[[MicroBatchRecord, int], None]
"""Called with every record and the number of updates that the job will make."""


def submit(place: Place, recipe: Recipe, observe: Observer) -> Outcome:
    """Trains an adapter and writes it, metrics.jsonl and job.json to the output directory.

    Raises:
        HetrainError: whatever goes wrong; the data set is checked in whole before anything starts.
        Interrupted: the user stopped it; the adapter as it then stood is written.
    """
    base = open_base(place.model)
    rows = read_rows(place.dataset, base.tokenizer, recipe.batches.max_length)
    total_steps = count_updates(rows, recipe)
    output = OutputDirectory(place.output_dir, overwrite=place.overwrite)
    try:
        with open_session(
            base,
            recipe.outsourcing,
            place.broker_url,
            place.device,
            output.log_file,
            micro_batches=total_steps * recipe.flight.batches_per_update,
        ) as session:
            job = _describe(place, recipe, session, total_steps)
            output.write_job(job | {"status": "running"})
            return _run(base, session, rows, recipe, total_steps, output, job, observe)
    except KeyboardInterrupt:
        raise Interrupted(
            "stopped before the first update; no adapter was written", where=str(output.path)
        ) from None
    finally:
        output.close()


def count_updates(rows: list[Row], recipe: Recipe) -> int:
    """Optimizer updates that the job will make."""
    settings = recipe.batches
    if settings.max_steps > 0:
        return settings.max_steps
    batches = count_micro_batches(rows, settings.micro_batch_tokens, settings.seed, settings.epochs)
    return -(-batches // recipe.flight.batches_per_update)


def _run(
    base: Base,
    session: Session,
    rows: list[Row],
    recipe: Recipe,
    total_steps: int,
    output: OutputDirectory,
    job: dict[str, object],
    observe: Observer,
) -> Outcome:
    seed = recipe.batches.seed
    model = add_adapter(session.split, recipe.lora, seed)
    updater = Updater(adapter_parameters(model), recipe.optimizer, total_steps)
    share_cores(recipe.flight.in_flight)
    replicas = session.replicas(model, recipe.flight.in_flight)
    batches = _draw(rows, recipe, total_steps)
    begin, tokens, last = time.perf_counter(), 0, None
    status = "failed"
    try:
        for applied in train(updater, replicas, batches, recipe.flight, seed, session.channel.close):
            for record in records_of(applied, time.perf_counter() - begin):
                tokens, last = tokens + record.tokens, record
                output.add(record)
                observe(record, total_steps)
        status = "done"
    except KeyboardInterrupt:
        status = "interrupted"
        if last is not None:
            raise Interrupted(
                f"stopped after {last.step} of {total_steps} updates; the adapter as it stood was written",
                where=str(output.path),
            ) from None
        raise
    finally:
        if last is not None:
            output.save_adapter(model, updater.snapshot().values, base.reference)
        output.write_job(job | {"status": status, "steps": last.step if last else 0, "tokens": tokens})
    if last is None:
        raise DatasetError("the data set made no micro-batch")
    return Outcome(last.step, total_steps, tokens, time.perf_counter() - begin, last, output.path)


def _draw(rows: list[Row], recipe: Recipe, total_steps: int) -> Iterator[MicroBatch]:
    settings = recipe.batches
    n_epochs = None if settings.max_steps > 0 else settings.epochs
    drawn = epochs(rows, settings.micro_batch_tokens, settings.seed, n_epochs)
    return islice(drawn, total_steps * recipe.flight.batches_per_update)


def _describe(place: Place, recipe: Recipe, session: Session, total_steps: int) -> dict[str, object]:
    """job.json: everything needed to say what ran, and no secret: the broker's URL stays out."""
    return {
        "hetrain": hetrain.__version__,
        "model": place.model,
        "dataset": str(place.dataset),
        "engine": recipe.outsourcing.engine,
        "broker": "embedded" if place.broker_url is None else "given",
        "device": place.device,
        "plan_digest": session.split.plan.digest,
        "worker": {"name": session.worker.worker, "device": session.worker.device},
        "total_steps": total_steps,
        "recipe": asdict(recipe),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in _VERSIONED},
    }
