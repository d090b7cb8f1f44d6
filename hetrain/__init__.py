"""hetrain: private LoRA fine-tuning of open language models on untrusted machines.

The client keeps data, adapters and keys; workers multiply ciphertexts by public weights.

    import hetrain
    result = hetrain.finetune("rows.jsonl", model="smollm2-135m", output_dir="out", workers="rediss://...",
                              lora=hetrain.LoraConfig(r=16), training=hetrain.TrainingConfig(max_steps=20),
                              on_step=print)
    hetrain.evaluate("held_out.jsonl", adapter="out").loss

Without `workers`, a broker and a worker are started on this machine for the length of the call.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_FUNCTIONS = (
    "finetune",
    "dry_run",
    "evaluate",
    "prepare",
    "plan",
    "doctor",
    "merge",
    "export_gguf",
    "ask",
    "report",
    "cache",
)

# By name, not by an import statement: a worker imports this package too, and has neither of these modules.
_HOMES = dict.fromkeys(_FUNCTIONS, "hetrain.api")
_MODULES = ("jobs",)
_HOMES |= dict.fromkeys(
    (
        "DataConfig",
        "TrainingDataConfig",
        "LoraConfig",
        "OutsourcingConfig",
        "BatchingConfig",
        "TrainingConfig",
        "ComparisonConfig",
    ),
    "hetrain.config",
)

__all__ = ["__version__", *_HOMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"hetrain.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
