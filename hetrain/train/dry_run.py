"""A job up to its first update: everything is checked, nothing is sent, and no file of the run is written."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from hetrain.config import JobSpec
from hetrain.data.dataset import JobRows
from hetrain.nn.lora import add_adapter
from hetrain.nn.split import SplitModel, split_model
from hetrain.public.broker.server_info import ask_broker
from hetrain.public.errors import UsageError
from hetrain.train.output_dir import require_unused
from hetrain.train.prepared_job import PreparedJob, make_updater, prepare_job
from hetrain.train.session import largest_product, torch_device
from hetrain.transport.scheduling.flow_control import ByteBudget, share_of


@dataclass(frozen=True)
class CheckedJob:
    """What a job was found to be.

    Attributes:
        prepared: the job, its rows as tokens.
        split: its model.
        adapter_parameters: numbers that are trained.
    """

    prepared: PreparedJob = field(repr=False)
    split: SplitModel = field(repr=False)
    adapter_parameters: int


def check_job(spec: JobSpec, raw_rows: JobRows) -> CheckedJob:
    """Does what a job does before its first update, but for workers.

    Raises:
        HetrainError: as the job would.
    """
    torch_device(spec.device)
    job = prepare_job(spec, raw_rows)
    _require_output(spec, job)
    split = split_model(job.base.files, spec.outsourcing.patterns)
    if job.checkpoint is not None:
        job.checkpoint.require({**job.identity, "plan_sha256": split.plan.digest})
    if spec.workers is not None:
        _require_broker(spec, spec.workers, split)
    updater = make_updater(job, add_adapter(split, spec.lora, spec.training.seed))
    return CheckedJob(job, split, sum(value.numel() for value in updater.snapshot().values.values()))


def _require_output(spec: JobSpec, job: PreparedJob) -> None:
    """Raises `UsageError` unless the output directory can be used, or made."""
    if job.kept_steps is None and not spec.overwrite_output_dir:
        require_unused(spec.output_dir)
    there = next(path for path in (spec.output_dir, *_absolute(spec.output_dir).parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UsageError("cannot be written", where=str(there), hint="choose another `output_dir`")


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def _require_broker(spec: JobSpec, url: str, split: SplitModel) -> None:
    """Raises `BrokerError` or `UsageError` unless the broker answers and can hold a product."""
    capacity, limit = ask_broker(url).maxmemory, spec.training.max_bytes_in_flight
    budget = ByteBudget(limit or share_of(capacity), strict=limit is not None, capacity=capacity)
    budget.require(largest_product(split.plan, spec.training.tokens_per_micro_batch))
