"""The files of an adapter: written as stock peft reads them, and what they say of its base model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from hetrain.jobs.files import JOB_FILE
from hetrain.public.errors import UsageError

CONFIG_FILE = "adapter_config.json"


def write_adapter(
    model: PeftModel,
    base_name: str,
    tokenizer: PreTrainedTokenizerBase,
    values: Mapping[str, torch.Tensor],
    directory: Path,
) -> None:
    """Writes an adapter and its tokenizer.

    Args:
        model: holds the adapter's configuration.
        base_name: the base model's public name.
        tokenizer: the base model's, with the chat template that training used.
        values: the adapter's parameters by name in `model`.
        directory: where to.
    """
    for config in model.peft_config.values():
        config.base_model_name_or_path = base_name
    # The embeddings are never trained; by default peft looks for the base model on the hub.
    model.save_pretrained(str(directory), state_dict=dict(values), save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # peft's form to fill in; the run writes its own
    tokenizer.save_pretrained(str(directory))


def read_config(adapter: Path) -> dict[str, Any]:
    """adapter_config.json. Raises `UsageError` when there is none."""
    try:
        config: dict[str, Any] = dict(json.loads((adapter / CONFIG_FILE).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UsageError(
            f"no {CONFIG_FILE} there that can be read",
            where=str(adapter),
            hint="give the output directory of a training job",
        ) from error
    return config


def read_job(adapter: Path) -> dict[str, Any]:
    """job.json of the run that made an adapter or checkpoint; empty when there is none that can be read."""
    for directory in (adapter, adapter.resolve().parent):
        try:
            return dict(json.loads((directory / JOB_FILE).read_bytes()))
        except (OSError, ValueError, TypeError, RecursionError):
            if not adapter.name.startswith("checkpoint-"):
                break
    return {}


def base_model_of(adapter: Path) -> str:
    """Where the base model of an adapter is: as its run found it here, or else its public name.

    Raises:
        UsageError: the adapter names none.
    """
    name, job = read_config(adapter).get("base_model_name_or_path"), read_job(adapter)
    if "model_path" in job:  # None: the run found the model by its name
        path, label = job["model_path"], job.get("model")
        if path is None and isinstance(label, str):
            return label
        if isinstance(path, str) and os.path.isdir(path):
            return path
    if not isinstance(name, str) or not name:
        raise UsageError(f"{CONFIG_FILE} names no base model", where=str(adapter), hint="give `model`")
    return name
