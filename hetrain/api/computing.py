"""What workers compute without training: evaluations and hints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from hetrain import config
from hetrain.api.arguments import DatasetNames, broker_url
from hetrain.config import BatchingConfig, DataConfig, OutsourcingConfig
from hetrain.config.fields import as_tuple

if TYPE_CHECKING:
    from hetrain.train.evaluation import Evaluation
    from hetrain.train.preparation import Preparation


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
        workers=broker_url(workers),
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

    return run(model, broker_url(workers), outsource, on_prepare)
