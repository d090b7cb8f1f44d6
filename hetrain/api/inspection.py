"""What would happen, who is there, and what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hetrain import config
from hetrain.api.arguments import NO_COMPARISON, DatasetNames, broker_url
from hetrain.config import ComparisonConfig, DataConfig, OutsourcingConfig, TrainingConfig
from hetrain.config.fields import as_tuple

if TYPE_CHECKING:
    from hetrain.inspection.cache import CacheReport
    from hetrain.inspection.doctor import DoctorReport
    from hetrain.inspection.plan_report import PlanReport


def plan(
    model: str = config.JobSpec.model,
    *,
    outsource: Sequence[str] = OutsourcingConfig.outsource,
    training: TrainingConfig = config.JobSpec.training,
    dataset: DatasetNames | None = None,
    data: DataConfig = config.EvaluationSpec.data,
    comparison: ComparisonConfig = NO_COMPARISON,
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
    return plan_report(model, outsource, training, rows, comparison, broker_url(workers))


def doctor(workers: str | None = None, *, model: str | None = None) -> DoctorReport:
    """Whether this machine and the workers can run a job, and on what. Raises nothing: see its `failure`.

    Args:
        workers: as of `finetune`.
        model: as of `finetune`; says also whether it can be trained, and which workers have it. None asks
            about none.
    """
    from hetrain.inspection.doctor import diagnose

    return diagnose(workers, model)


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
