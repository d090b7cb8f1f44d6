"""Training, and a check of all that comes before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetrain import config
from hetrain.api.arguments import NO_COMPARISON, DatasetNames, broker_url
from hetrain.config import (
    ComparisonConfig,
    LoraConfig,
    OutsourcingConfig,
    TrainingConfig,
    TrainingDataConfig,
)
from hetrain.config.fields import as_tuple, require

if TYPE_CHECKING:
    from hetrain.data.dataset import JobRows
    from hetrain.inspection.plan_report import PlanReport
    from hetrain.train.evaluation import Evaluation
    from hetrain.train.metrics import MicroBatchMetrics
    from hetrain.train.outcome import JobResult


def finetune(
    dataset: DatasetNames,
    *,
    data: TrainingDataConfig = config.JobSpec.data,
    model: str = config.JobSpec.model,
    output_dir: str | PathLike[str] = config.JobSpec.output_dir,
    workers: str | None = None,
    device: str = config.JobSpec.device,
    lora: LoraConfig = config.JobSpec.lora,
    training: TrainingConfig = config.JobSpec.training,
    outsourcing: OutsourcingConfig = config.JobSpec.outsourcing,
    comparison: ComparisonConfig = NO_COMPARISON,
    overwrite_output_dir: bool = False,
    resume_from_checkpoint: str | PathLike[str] | None = None,
    init_from: str | PathLike[str] | None = None,
    on_step: Callable[[MicroBatchMetrics], object] = lambda metrics: None,
    on_stop: Callable[[], object] = lambda: None,
    on_prepare: Callable[[int, int], object] = lambda done, total: None,
    on_evaluating: Callable[[int, int], object] = lambda done, total: None,
    on_evaluation: Callable[[int, Evaluation], object] = lambda step, evaluation: None,
    on_start: Callable[[str], object] = lambda job_id: None,
) -> JobResult:
    """Fine-tunes a model with LoRA on workers that see only ciphertexts.

    SIGINT or SIGTERM once finishes the updates that have begun and writes adapter and checkpoint; twice
    leaves at once. Both end in `Interrupted`.

    Args:
        dataset: a file or folder of rows (JSONL, JSON, CSV, Parquet, each text form also as .gz), ``-`` for
            standard input, or a data set's id on the hub; or several of them.
        data: which columns are learned, and which rows are held out.
        model: ``smollm2-135m``, a Hugging Face directory, or a hub id.
        output_dir: directory of adapter, metrics and checkpoints.
        workers: URL of the workers' broker; None starts a broker and a worker on this machine for this job.
        device: torch device of the client's own layers.
        lora: the adapter.
        training: optimizer, batches, staleness and checkpoints.
        outsourcing: what leaves for the workers, and how it is encrypted.
        comparison: what groups are judged by where `outsourcing` has ``auto``; without a link in it, that to
            `workers` is measured.
        overwrite_output_dir: replace the adapter and checkpoints of another run.
        resume_from_checkpoint: a checkpoint's directory, or ``latest`` for the last one in `output_dir`.
        init_from: a PEFT LoRA adapter of the same model to start from; None starts from a fresh one.
        on_step: called with the metrics of every micro-batch of an update.
        on_stop: called once a signal has asked the run to stop.
        on_prepare: called with the number of hints that are made, and of those that the cache lacked.
        on_evaluating: called with the micro-batches of an evaluation that are computed, and their number.
        on_evaluation: called with the update after which the held-out rows were evaluated, and the result.
        on_start: called with the job's id (see `hetrain.jobs`) once workers have agreed to compute it.

    Returns:
        The run in figures; `output_dir` then holds a PEFT adapter.

    Raises:
        HetrainError: the data set, a setting, the model, the broker or the workers do not allow the job.
        Interrupted: a signal has stopped it.
    """
    spec = _job_spec(
        dataset,
        data=data,
        model=model,
        output_dir=output_dir,
        workers=workers,
        device=device,
        lora=lora,
        training=training,
        outsourcing=outsourcing,
        overwrite_output_dir=overwrite_output_dir,
        resume_from_checkpoint=resume_from_checkpoint,
        init_from=init_from,
    )
    rows = _checked_rows(spec)
    spec = with_chosen_groups(spec, comparison)
    from hetrain.train.callbacks import Callbacks  # imports torch, which takes seconds
    from hetrain.train.finetune import finetune as run

    callbacks = Callbacks(
        on_step=on_step,
        on_stop=on_stop,
        on_prepare=on_prepare,
        on_evaluating=on_evaluating,
        on_evaluation=on_evaluation,
        on_start=on_start,
    )
    return run(spec, rows, callbacks)


def dry_run(
    dataset: DatasetNames, *, comparison: ComparisonConfig = NO_COMPARISON, **settings: Any
) -> DryRun:
    """Checks a job up to its first update: settings, rows, model, checkpoint, adapter, broker and workers.

    Starts nothing, sends nothing but questions, and writes nothing to the output directory.

    Args:
        dataset: as of `finetune`.
        comparison: as of `finetune`.
        settings: the other arguments of `finetune`, but for callbacks.

    Returns:
        What the job would do.

    Raises:
        HetrainError: why it would not run.
    """
    spec = _job_spec(dataset, **settings)
    rows = _checked_rows(spec)
    spec = with_chosen_groups(spec, comparison)
    from hetrain.inspection.doctor import diagnose
    from hetrain.inspection.plan_report import report_of
    from hetrain.train.dry_run import check_job

    checked = check_job(spec, rows)
    if spec.workers is not None and (failure := diagnose(spec.workers, spec.model).failure):
        raise failure
    job = checked.prepared
    return DryRun(
        plan=report_of(checked.split, spec.training, job.rows),
        adapter_parameters=checked.adapter_parameters,
        held_out_rows=len(job.held_out),
        done_steps=job.start.updates,
        total_steps=job.total_steps,
        output_dir=spec.output_dir,
    )


@dataclass(frozen=True)
class DryRun:
    """What a job would do.

    Attributes:
        plan: the matrices that would leave, the updates and their bytes.
        adapter_parameters: numbers that it would train.
        held_out_rows: rows that it would evaluate.
        done_steps: updates that an earlier run has made,
        total_steps: of so many.
        output_dir: where it would write.
    """

    plan: PlanReport
    adapter_parameters: int
    held_out_rows: int
    done_steps: int
    total_steps: int
    output_dir: Path


def with_chosen_groups(spec: config.JobSpec, comparison: ComparisonConfig = NO_COMPARISON) -> config.JobSpec:
    """`spec` with the patterns that ``auto`` stands for; any other as it is.

    This machine is measured for about 20 seconds, and the link to the workers unless `comparison` gives one.

    Raises:
        UsageError: nothing pays at the link, what is to be measured cannot be, or `comparison` is given for a
            job whose patterns are given too.
        HetrainError: the model or the broker do not allow it.
    """
    if not spec.outsourcing.is_auto:
        require(
            comparison == NO_COMPARISON,
            "link",
            "the job is not compared with anything",
            "it is for `outsource` auto; `hetrain plan` compares",
        )
        return spec
    from hetrain.inspection.automatic import choose_patterns

    chosen = choose_patterns(spec, comparison)
    return replace(spec, outsourcing=replace(spec.outsourcing, outsource=chosen))


def _job_spec(
    dataset: DatasetNames,
    *,
    output_dir: str | PathLike[str] = config.JobSpec.output_dir,
    workers: str | None = None,
    resume_from_checkpoint: str | PathLike[str] | None = None,
    init_from: str | PathLike[str] | None = None,
    **others: Any,
) -> config.JobSpec:
    """A job from the arguments of `finetune`. Raises `UsageError`."""
    return config.JobSpec(
        dataset=as_tuple(dataset),
        output_dir=Path(output_dir),
        workers=broker_url(workers),
        resume_from_checkpoint=None if resume_from_checkpoint is None else str(resume_from_checkpoint),
        init_from=None if init_from is None else Path(init_from),
        **others,
    )


def _checked_rows(spec: config.JobSpec) -> JobRows:
    """The rows of a job, after all that can be checked without torch."""
    from hetrain.data.dataset import read_job_rows
    from hetrain.public.model.files import require_model_name
    from hetrain.train.tracking import require_trackers

    require_model_name(spec.model)
    require_trackers(spec.training.report_to)
    return read_job_rows(spec)
