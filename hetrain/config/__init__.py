"""Every setting of hetrain, once: its name, type, default, meaning and the values that make sense.

The options of the command line and ``docs/reference/options.md`` are made from these fields. Texts name
another setting in backticks, which the command line replaces by its option.
"""

from hetrain.config.adapter import ALL_LINEAR, LoraConfig
from hetrain.config.batching import BatchingConfig
from hetrain.config.comparison import MEASURED, ComparisonConfig
from hetrain.config.data import DataConfig, TrainingDataConfig
from hetrain.config.jobs import DEFAULT_MODEL, LATEST, EvaluationSpec, JobSpec, RunSpec
from hetrain.config.outsourcing import AUTO, ENGINES, OutsourcingConfig
from hetrain.config.training import FEW_UPDATES, TrainingConfig

__all__ = [
    "ALL_LINEAR",
    "AUTO",
    "DEFAULT_MODEL",
    "ENGINES",
    "FEW_UPDATES",
    "LATEST",
    "MEASURED",
    "BatchingConfig",
    "ComparisonConfig",
    "DataConfig",
    "EvaluationSpec",
    "JobSpec",
    "LoraConfig",
    "OutsourcingConfig",
    "RunSpec",
    "TrainingConfig",
    "TrainingDataConfig",
]
