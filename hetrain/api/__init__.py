"""The functions of hetrain, as Python and the command line call them.

Nothing heavy is imported before a function is called. Every error is a `hetrain.public.errors.HetrainError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetrain.api.adapters import ask, export_gguf, merge, report
from hetrain.api.computing import evaluate, prepare
from hetrain.api.inspection import cache, doctor, plan
from hetrain.api.training import DryRun, dry_run, finetune, with_chosen_groups

if TYPE_CHECKING:
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

__all__ = [
    "DryRun",
    "ask",
    "cache",
    "doctor",
    "dry_run",
    "evaluate",
    "export_gguf",
    "finetune",
    "merge",
    "plan",
    "prepare",
    "report",
    "with_chosen_groups",
]
