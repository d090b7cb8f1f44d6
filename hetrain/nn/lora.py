"""Adapters by peft on a split model, with dropout that depends on the micro-batch alone."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from hetrain.nn.split import SplitModel
from hetrain.public.errors import UsageError

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraSettings:
    """LoRA (arXiv 2106.09685): y += dropout(x)·Aᵀ·Bᵀ·(alpha/r) on every target module.

    `target_modules` are module name suffixes as peft takes them; ``("all-linear",)`` is every outsourced linear.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] = (ALL_LINEAR,)

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha < 1 or not 0 <= self.dropout < 1 or not self.target_modules:
            raise UsageError(
                f"rank {self.r}, alpha {self.alpha}, dropout {self.dropout} make no LoRA",
                where="--lora-r, --lora-alpha, --lora-dropout",
                hint="rank and alpha are at least 1, dropout lies in [0, 1)",
            )


class SeededDropout(nn.Module):
    """Inverted dropout with its own generator: x·mask/(1-p). Does nothing while `generator` is None.

    Micro-batches run in several threads, and torch's global generator would hand out masks in the order in
    which they happen to ask.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.generator: torch.Generator | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.generator is None:
            return x
        kept = torch.rand(x.shape, generator=self.generator) >= self.p
        return x * kept.to(x.device, x.dtype) / (1 - self.p)


def add_adapter(split: SplitModel, settings: LoraSettings, seed: int) -> PeftModel:
    """A fresh adapter on the split model: A random from `seed`, B zero.

    Raises:
        UsageError: no module matches the targets, or one is not outsourced.
    """
    targets = ALL_LINEAR if settings.target_modules == (ALL_LINEAR,) else list(settings.target_modules)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=split.plan.model,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model = get_peft_model(split.causal, config)
        except ValueError as error:
            raise UsageError(
                f"peft cannot place the adapter: {error}",
                where="--lora-target-modules",
                hint=f"use {ALL_LINEAR}, or names from `hetrain plan`",
            ) from error
    _seed_dropouts(model)
    return model


def load_adapter(split: SplitModel, directory: Path) -> PeftModel:
    """The adapter in `directory`, on the split model, frozen.

    Raises:
        UsageError: there is no adapter, or it was made for another architecture.
    """
    if not (directory / "adapter_config.json").is_file():
        raise UsageError("no adapter_config.json there", where=str(directory), hint="give the output of `hetrain submit`")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(split.causal, str(directory))
    except (ValueError, RuntimeError, OSError, TypeError) as error:
        raise UsageError(f"the adapter does not fit this model: {error}", where=str(directory)) from error
    if any("missing adapter keys" in str(warning.message).lower() for warning in caught):
        raise UsageError("the adapter lacks weights that this model needs", where=str(directory))
    _seed_dropouts(model)
    return model


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _seed_dropouts(model: PeftModel) -> None:
    for module in model.modules():
        dropouts = getattr(module, "lora_dropout", None)
        if isinstance(dropouts, nn.ModuleDict):
            for name, dropout in dropouts.items():
                if isinstance(dropout, nn.Dropout):
                    dropouts[name] = SeededDropout(dropout.p)
    # The base model's own dropouts stay off: they would draw from the global generator.
    model.eval()
