"""The functions of hetrain, as Python and the command line call them.

Nothing heavy is imported before a function is called. Every error is a `hetrain.public.errors.HetrainError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetrain import config
from hetrain.config import (
    BatchingConfig,
    ComparisonConfig,
    DataConfig,
    LoraConfig,
    OutsourcingConfig,
    TrainingConfig,
    TrainingDataConfig,
)
from hetrain.config.fields import as_tuple, require

if TYPE_CHECKING:
    from hetrain.data.dataset import JobRows
    from hetrain.data.updates import Course as Course
    from hetrain.export.merge import Export as Export
    from hetrain.inspection.cache import CacheReport as CacheReport
    from hetrain.inspection.comparison import Comparison as Comparison
    from hetrain.inspection.doctor import DoctorReport as DoctorReport
    from hetrain.inspection.plan_report import GroupReport as GroupReport
    from hetrain.inspection.plan_report import PlanReport as PlanReport
    from hetrain.train.evaluation import Evaluation as Evaluation
    from hetrain.train.metrics import MicroBatchMetrics as MicroBatchMetrics
    from hetrain.train.outcome import JobResult as JobResult
    from hetrain.train.preparation import Preparation as Preparation

DatasetNames = str | PathLike[str] | Sequence[str | PathLike[str]]

_COMPARISON = ComparisonConfig()


def _address(workers: str | None) -> str | None:
    """The broker's address, completed by a password from a file."""
    from hetrain.public.settings import broker_address

    return None if workers is None else broker_address(workers)


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
    comparison: ComparisonConfig = _COMPARISON,
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


def dry_run(dataset: DatasetNames, *, comparison: ComparisonConfig = _COMPARISON, **settings: Any) -> DryRun:
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


def with_chosen_groups(spec: config.JobSpec, comparison: ComparisonConfig = _COMPARISON) -> config.JobSpec:
    """`spec` with the patterns that ``auto`` stands for; any other as it is.

    This machine is measured for about 20 seconds, and the link to the workers unless `comparison` gives one.

    Raises:
        UsageError: nothing pays at the link, what is to be measured cannot be, or `comparison` is given for a
            job whose patterns are given too.
        HetrainError: the model or the broker do not allow it.
    """
    if not spec.outsourcing.is_auto:
        require(
            comparison == _COMPARISON,
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
        workers=_address(workers),
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


def evaluate(
    dataset: DatasetNames,
    *,
    data: DataConfig = config.EvaluationSpec.data,
    adapter: str | PathLike[str] | None = None,
    model: str | None = None,
    workers: str | None = None,
    device: str = config.EvaluationSpec.device,
    batching: BatchingConfig = config.EvaluationSpec.batching,
    outsourcing: OutsourcingConfig = config.EvaluationSpec.outsourcing,
    on_prepare: Callable[[int, int], object] = lambda done, total: None,
) -> Evaluation:
    """Loss and perplexity of a data set, on workers that see only ciphertexts.

    Args:
        dataset: as of `finetune`.
        data: which columns count.
        adapter: output directory of a job, or another PEFT LoRA adapter; None evaluates the base model.
        model: the base model; None takes that of the adapter, or the default of `finetune`.
        workers: as of `finetune`.
        device: as of `finetune`.
        batching: how rows become micro-batches, and how many of these are computed at once; a
            `TrainingConfig` is one too.
        outsourcing: as of `finetune`.
        on_prepare: as of `finetune`.

    Raises:
        HetrainError: as `finetune`.
    """
    spec = config.EvaluationSpec(
        dataset=as_tuple(dataset),
        data=data,
        adapter=None if adapter is None else Path(adapter),
        model=model,
        workers=_address(workers),
        device=device,
        batching=batching,
        outsourcing=outsourcing,
    )
    from hetrain.data.dataset import read_raw_rows
    from hetrain.data.sources import HubSplit
    from hetrain.public.model.files import require_model_name

    if spec.model is not None:
        require_model_name(spec.model)
    rows = read_raw_rows(spec.dataset, spec.data, HubSplit.to_evaluate(spec.data))
    from hetrain.train.evaluation import evaluate as run

    return run(spec, rows, on_prepare)


def prepare(
    model: str = config.JobSpec.model,
    *,
    workers: str | None = None,
    outsource: Sequence[str] = OutsourcingConfig.outsource,
    on_prepare: Callable[[int, int], object] = lambda done, total: None,
) -> Preparation:
    """Has workers compute the hints of a model that the cache lacks, as a job would before it starts.

    Args:
        model: as of `finetune`.
        workers: as of `finetune`.
        outsource: see `OutsourcingConfig`.
        on_prepare: as of `finetune`.

    Raises:
        HetrainError: the model, the broker, the workers or the disk do not allow it.
    """
    from hetrain.train.preparation import prepare as run

    return run(model, _address(workers), outsource, on_prepare)


def plan(
    model: str = config.JobSpec.model,
    *,
    outsource: Sequence[str] = OutsourcingConfig.outsource,
    training: TrainingConfig = config.JobSpec.training,
    dataset: DatasetNames | None = None,
    data: DataConfig = config.EvaluationSpec.data,
    comparison: ComparisonConfig = _COMPARISON,
    workers: str | None = None,
) -> PlanReport:
    """The matrices that would leave for the workers, bytes on the wire, and the updates of a training.

    With a link also the job's hours and costs beside those of the same training on this machine, which is
    measured for about 20 seconds. Starts no job.

    Args:
        model: as of `finetune`.
        outsource: see `OutsourcingConfig`; ``auto`` alone chooses the groups that pay at the link of
            `comparison`.
        training: as of `finetune`.
        dataset: as of `finetune`; None leaves the number of updates open.
        data: which columns are learned.
        comparison: the link, and what is measured and assumed.
        workers: URL of a broker against which the link is to be measured.

    Raises:
        UsageError: a pattern has no match, a setting makes no sense for the rows, or what is to be measured
            cannot be.
        BrokerError: the broker, against which the link is to be measured, cannot be reached.
        ModelError: the model cannot be found, read or split.
        DatasetError: the data set cannot be read.
    """
    from hetrain.data.dataset import read_raw_rows
    from hetrain.data.sources import HubSplit

    names = () if dataset is None else as_tuple(dataset)
    raw = read_raw_rows(names, data, HubSplit.to_train(data)) if names else []
    from hetrain.inspection.plan_report import DataSet, plan_report

    rows = DataSet(raw, data) if names else None
    return plan_report(model, outsource, training, rows, comparison, _address(workers))


def doctor(workers: str | None = None, *, model: str | None = None) -> DoctorReport:
    """Whether this machine and the workers can run a job, and on what. Raises nothing: see its `failure`.

    Args:
        workers: as of `finetune`.
        model: as of `finetune`; says also whether it can be trained, and which workers have it. None asks
            about none.
    """
    from hetrain.inspection.doctor import diagnose

    return diagnose(workers, model)


def merge(
    adapter: str | PathLike[str],
    output_dir: str | PathLike[str],
    *,
    dtype: str = "bfloat16",
    model: str | None = None,
    check: str | PathLike[str] | None = None,
    device: str = "cpu",
) -> Export:
    """Merges an adapter into its base model: a Hugging Face directory, in clear on this machine.

    It appears whole or not at all: its loss on held-out rows must be the trained adapter's, within
    `hetrain.export.check.LOSS_BOUNDS`.

    Args:
        adapter: output directory of a job, one of its checkpoints, or another PEFT LoRA adapter.
        output_dir: a directory that is new or empty.
        dtype: of the weights: ``bfloat16``, ``float16`` or ``float32``. Merging itself is done in float32.
        model: the base model; None takes the adapter's.
        check: held-out rows; None takes those that the adapter was evaluated on last, or else a fixed text.
        device: torch device to compute on.

    Raises:
        UsageError: a setting makes no sense, or `output_dir` cannot be written.
        ModelError: the base model cannot be loaded, or the losses differ.
        DatasetError: the rows cannot be read.
    """
    from hetrain.export.merge import merge as run

    return run(Path(adapter), Path(output_dir), dtype, model, None if check is None else Path(check), device)


def export_gguf(
    adapter: str | PathLike[str],
    output: str | PathLike[str],
    *,
    model: str | None = None,
    check: str | PathLike[str] | None = None,
    device: str = "cpu",
) -> Export:
    """Writes an adapter as llama.cpp reads it: a LoRA GGUF in float32, checked before it gets its name.

    Args:
        adapter: as of `merge`.
        output: a file that does not exist yet.
        model: as of `merge`.
        check: as of `merge`.
        device: as of `merge`.

    Raises:
        UnsupportedArchitecture: the base model's layout in llama.cpp is not known.
        HetrainError: as `merge`.
    """
    from hetrain.export.gguf_adapter import export_gguf as run

    return run(Path(adapter), Path(output), model, None if check is None else Path(check), device)


def ask(
    adapter: str | PathLike[str],
    questions: str | Sequence[str],
    *,
    model: str | None = None,
    prompt_template: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    base_only: bool = False,
    device: str = "cpu",
) -> list[str]:
    """Answers of an adapter, in clear on this machine, by transformers and peft.

    Args:
        adapter: as of `merge`.
        questions: one or several.
        model: as of `merge`.
        prompt_template: a text with ``{}`` in the place of the question; None words questions as the training
            rows did.
        max_new_tokens: the most tokens of an answer.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        seed: of the draws.
        base_only: ask the base model without the adapter, with the same prompts.
        device: as of `merge`.

    Raises:
        UsageError: there is no adapter, it does not fit, or a question is empty.
        ModelError: the base model cannot be found or loaded.
    """
    from hetrain.export.asking import Generation, Respondent

    how = Generation(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    respondent = Respondent(Path(adapter), model, prompt_template, device)
    return respondent.answer(
        [questions] if isinstance(questions, str) else questions, how, adapted=not base_only
    )


def report(output_dir: str | PathLike[str], output: str | PathLike[str] | None = None) -> Path:
    """Writes one HTML page on a run, from its own records.

    Args:
        output_dir: output directory of a job.
        output: the page's file; None is ``report.html`` in `output_dir`.

    Returns:
        The page's file.

    Raises:
        UsageError: there are no records, or the page cannot be written.
    """
    from hetrain.export.report.page import write_report

    return write_report(Path(output_dir), None if output is None else Path(output))


def cache(names: Sequence[str] = (), *, clear: bool = False) -> CacheReport:
    """What lies in the cache: hints and converted models.

    Args:
        names: its parts; none for all.
        clear: remove them. Jobs that run now may need them.

    Raises:
        UsageError: there is no such part, or the cache cannot be used.
    """
    from hetrain.inspection.cache import inspect_cache

    return inspect_cache(names, clear=clear)
