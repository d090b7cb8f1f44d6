"""An adapter on its base model by stock transformers and peft: in clear, on this machine."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from hetrain.data.tokenization import load_tokenizer
from hetrain.nn.adapter_files import base_model_of, read_config
from hetrain.public.errors import ModelError, UsageError
from hetrain.public.model.files import ModelFiles, resolve


@dataclass(frozen=True)
class AdapterSource:
    """An adapter's directory, and the files of its base model."""

    directory: Path
    base: ModelFiles

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The adapter's own tokenizer, or else the base model's."""
        if (self.directory / "tokenizer_config.json").is_file():
            return AutoTokenizer.from_pretrained(str(self.directory))
        return load_tokenizer(self.base)


def open_adapter(adapter: Path, model: str | None = None) -> AdapterSource:
    """Finds an adapter's base model.

    Args:
        adapter: output directory of a job, one of its checkpoints, or another PEFT LoRA adapter.
        model: the base model; None takes the adapter's.

    Raises:
        UsageError: there is no LoRA adapter, or it names no base model.
        ModelError: the base model cannot be found.
    """
    kind = read_config(adapter).get("peft_type")
    if kind != "LORA":
        raise UsageError(f"the adapter is {kind}, not LoRA", where=str(adapter))
    name = model or base_model_of(adapter)
    try:
        return AdapterSource(adapter, resolve(name))
    except ModelError as error:
        if model is not None:
            raise
        raise ModelError(
            f"the adapter's base model {name} is not here: {error.what}",
            where=str(adapter),
            hint="give it with `model`: an alias, a directory or a hub id",
        ) from error


def load_base(files: ModelFiles, device: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The base model. Raises `ModelError` when transformers cannot load it."""
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(files.directory, dtype=dtype).to(device)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"transformers cannot load it: {error}", where=files.label) from error
    return model.eval()


def load_adapted(source: AdapterSource, device: str = "cpu") -> PeftModel:
    """Base model and adapter in float32, for inference.

    Raises:
        ModelError: the base model cannot be loaded.
        UsageError: the adapter does not fit it.
    """
    base = load_base(source.base, device)
    try:
        with quiet_transformers():
            adapted = PeftModel.from_pretrained(base, str(source.directory)).eval()
            stored = adapter_tensors(source)
    except (ValueError, RuntimeError, OSError, TypeError) as error:
        raise UsageError(
            f"the adapter does not fit {source.base.label}: {error}", where=str(source.directory)
        ) from error
    _require_all(adapted, stored, source)
    return adapted


def adapter_tensors(source: AdapterSource) -> dict[str, torch.Tensor]:
    """The tensors of the adapter's file by name. Raises what peft raises where there is none."""
    tensors: dict[str, torch.Tensor] = load_peft_weights(str(source.directory), device="cpu")
    return tensors


def _require_all(adapted: PeftModel, stored: Collection[str], source: AdapterSource) -> None:
    # peft only warns of tensors that it misses, and says nothing of those that have no place.
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    missing = sorted(wanted - set(stored))
    left_over = sorted(set(stored) - wanted - adapted.state_dict().keys())
    for what, names in (("it lacks", missing), ("there is no place for its", left_over)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UsageError(
                f"the adapter does not fit {source.base.label}: {what} {names[0]}{more}",
                where=str(source.directory),
                hint="leave `model` out: the adapter names its base model",
            )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the progress bars of transformers, and its warning of a method that peft calls."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()
