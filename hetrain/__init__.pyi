from hetrain import jobs as jobs
from hetrain.api import ask as ask
from hetrain.api import cache as cache
from hetrain.api import doctor as doctor
from hetrain.api import dry_run as dry_run
from hetrain.api import evaluate as evaluate
from hetrain.api import export_gguf as export_gguf
from hetrain.api import finetune as finetune
from hetrain.api import merge as merge
from hetrain.api import plan as plan
from hetrain.api import prepare as prepare
from hetrain.api import report as report
from hetrain.config import BatchingConfig as BatchingConfig
from hetrain.config import ComparisonConfig as ComparisonConfig
from hetrain.config import DataConfig as DataConfig
from hetrain.config import LoraConfig as LoraConfig
from hetrain.config import OutsourcingConfig as OutsourcingConfig
from hetrain.config import TrainingConfig as TrainingConfig
from hetrain.config import TrainingDataConfig as TrainingDataConfig

__version__: str
__all__ = [
    "BatchingConfig",
    "ComparisonConfig",
    "DataConfig",
    "LoraConfig",
    "OutsourcingConfig",
    "TrainingConfig",
    "TrainingDataConfig",
    "__version__",
    "ask",
    "cache",
    "doctor",
    "dry_run",
    "evaluate",
    "export_gguf",
    "finetune",
    "jobs",
    "merge",
    "plan",
    "prepare",
    "report",
]
