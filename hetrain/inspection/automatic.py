"""Which groups of a job leave where ``auto`` is to choose."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from hetrain.config import AUTO, LATEST, MEASURED, ComparisonConfig, JobSpec
from hetrain.inspection.plan_report import PlanReport, plan_report
from hetrain.jobs.run import read_run
from hetrain.jobs.settings import from_json
from hetrain.public.errors import UsageError
from hetrain.public.quantities import say_bits_per_second
from hetrain.public.spelling import say_alike

_log = logging.getLogger(__name__)


def choose_patterns(spec: JobSpec, comparison: ComparisonConfig) -> tuple[str, ...]:
    """The patterns that ``auto`` stands for in a job, for all of its runs.

    A run that goes on from a checkpoint has those of the one before. Otherwise the groups that pay over the
    link of `comparison` are chosen as `hetrain plan` does; without one the link to the broker is measured.

    Raises:
        UsageError: nothing pays, or what is to be measured cannot be.
        HetrainError: as `plan_report`.
    """
    if patterns := _recorded(spec):
        return patterns
    comparison = replace(comparison, link=comparison.link or MEASURED)
    found = plan_report(spec.model, (AUTO,), spec.training, None, comparison, spec.workers)
    assert found.comparison is not None
    rate = say_bits_per_second(found.comparison.link.bits_per_s)
    if not found.groups:
        raise UsageError(
            f"no group pays over {rate}: the job would be faster with all linears on this machine",
            field="outsource",
            hint="train locally, or name what is to leave; `hetrain plan` compares the two",
        )
    _log.info("%s", _said(found, rate))
    return found.patterns


def _said(found: PlanReport, rate: str) -> str:
    kept = say_alike(found.kept)
    stays = f"{kept} stay here, where they take the job less time than over the link" if kept else "all leave"
    return f"outsource {AUTO}, over {rate}: {stays}"


def _recorded(spec: JobSpec) -> tuple[str, ...]:
    """The patterns of the run whose checkpoint `spec` goes on from; none where it starts anew."""
    if spec.resume_from_checkpoint is None:
        return ()
    is_latest = spec.resume_from_checkpoint == LATEST
    run = read_run(spec.output_dir if is_latest else Path(spec.resume_from_checkpoint).expanduser().parent)
    if run is None:
        return ()
    try:
        outsourcing = from_json(run.settings).outsourcing
    except ValueError:
        return ()
    return () if outsourcing.is_auto else outsourcing.outsource
