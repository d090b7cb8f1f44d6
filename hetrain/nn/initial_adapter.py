"""An adapter that training starts from, instead of a fresh one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hetrain.config import LoraConfig
from hetrain.nn.adapter_files import read_config
from hetrain.public.errors import UsageError

_WEIGHTS_FILE = "adapter_model.safetensors"
_SETTINGS = {"r": "r", "lora_alpha": "alpha", "use_rslora": "use_rslora"}
# What changes the meaning of the same tensors, or needs the matrices that are not here.
_UNKNOWN = ("use_dora", "alpha_pattern", "use_qalora", "modules_to_save")


def require_alike(adapter: Path, lora: LoraConfig) -> None:
    """Raises `UsageError` unless `adapter` is a plain LoRA of the rank and scale that `lora` says."""
    config = read_config(adapter)
    if config.get("peft_type") != "LORA" or any(config.get(name) for name in _UNKNOWN):
        raise UsageError("only plain LoRA adapters can be trained further", where=str(adapter))
    for name, field in _SETTINGS.items():
        was, now = config.get(name, False), getattr(lora, field)
        if was != now:
            raise UsageError(
                f"`{field}` is {was} in the adapter to start from, and {now} in this job",
                where=str(adapter),
                hint=f"give `{field}` as the adapter has it",
            )
    if not (adapter / _WEIGHTS_FILE).is_file():
        raise UsageError(f"there is no {_WEIGHTS_FILE}", where=str(adapter))


def initial_values(adapter: Path, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values of `adapter` by the names of a job's parameters.

    Raises:
        UsageError: it has other modules or shapes than these, or cannot be read.
    """
    try:
        saved = load_file(adapter / _WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"the adapter cannot be read: {error}", where=str(adapter)) from error
    names = {name.replace(".default.", "."): name for name in parameters}
    if odd := sorted(saved.keys() ^ names.keys()):
        holder = "the adapter to start from" if odd[0] in names else "this job"
        raise UsageError(
            f"{holder} has no {odd[0]}",
            where=str(adapter),
            hint="give `target_modules` and `layers` as the adapter has them",
        )
    for name, value in saved.items():
        if value.shape != parameters[names[name]].shape:
            raise UsageError(
                f"{name} is {list(value.shape)}, and {list(parameters[names[name]].shape)} in this job",
                where=str(adapter),
                hint="it belongs to another model or has another rank",
            )
    return {names[name]: value for name, value in saved.items()}
