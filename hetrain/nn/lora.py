"""Adapters by peft on a split model: their parameters, names and files."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hetrain.config import ALL_LINEAR, LoraConfig
from hetrain.nn.dropout import SeededDropout
from hetrain.nn.families import Linear
from hetrain.nn.lora_branches import LoraBranch
from hetrain.nn.split import SplitModel
from hetrain.public.errors import UsageError


def add_adapter(split: SplitModel, lora: LoraConfig, seed: int) -> PeftModel:
    """A fresh adapter on the split model: A random from `seed`, B zero.

    Raises:
        UsageError: no module matches the targets, one is no linear of a decoder block, or the model has
            no such layer.
    """
    _require_layers(split, lora)
    _require_targets(split, lora)
    is_all, numbers = lora.target_modules == (ALL_LINEAR,), lora.layer_numbers
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        use_rslora=lora.use_rslora,
        lora_dropout=lora.dropout,
        target_modules=_targets(split, lora),
        layers_to_transform=None if numbers is None else list(numbers),
        exclude_modules=_outer_linears(split) if is_all else None,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft warns about a Conv1D beside the `RemoteLinear` of another.
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        # peft calls a method that transformers deprecates.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        torch.manual_seed(seed)
        try:
            model = get_peft_model(split.causal, config)
        except ValueError as error:
            raise UsageError(
                f"peft cannot place the adapter: {error}",
                field="target_modules",
                hint=f"use {ALL_LINEAR}, or names from `hetrain plan`",
            ) from error
    _require_block_linears(model, split)
    # The linears are plain here, but a Conv1D in the original model, for which the adapter is.
    config.fan_in_fan_out = split.conv1d
    _seed_dropouts(model)
    return model


def load_adapter(split: SplitModel, directory: Path) -> PeftModel:
    """The adapter in `directory`, on the split model, frozen.

    Raises:
        UsageError: there is no adapter, it was made for another architecture, or it is no plain LoRA.
    """
    if not (directory / "adapter_config.json").is_file():
        raise UsageError(
            "no adapter_config.json there",
            where=str(directory),
            hint="give the output directory of a training job",
        )
    try:
        _require_lora(directory)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(split.causal, str(directory))
    except (ValueError, RuntimeError, OSError, TypeError) as error:
        reason = next(iter(str(error).splitlines()[1:]), str(error)).strip()  # torch begins with a heading
        raise UsageError(
            f"the adapter does not fit this model: {reason}",
            where=str(directory),
            hint="leave `model` out: the adapter names its base model",
        ) from error
    if any("missing adapter keys" in str(warning.message).lower() for warning in caught):
        raise UsageError("the adapter lacks weights that this model needs", where=str(directory))
    _seed_dropouts(model)
    return model


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class GroupedLoraLinear(PeftLinear):  # type: ignore[misc]  # peft has no types
    """peft's linear with an adapter, which its group adds: see `hetrain.nn.lora_branches`."""

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """Base layer and adapter."""
        y: torch.Tensor = self.base_layer(x)
        return y


def take_branch(linear: nn.Module, columns: slice) -> LoraBranch | None:
    """The adapter of a linear that peft has wrapped, which no longer adds it itself; None if there is none.

    Args:
        linear: any linear of a replica.
        columns: those of its group's result that are the linear's.
    """
    if not isinstance(linear, PeftLinear):
        return None
    linear.__class__ = GroupedLoraLinear  # the same module, so that names and state stay
    (name,) = linear.active_adapters
    dropout = linear.lora_dropout[name]
    return LoraBranch(
        columns=columns,
        a=linear.lora_A[name].weight,
        b=linear.lora_B[name].weight,
        scale=float(linear.scaling[name]),
        dropout=dropout if isinstance(dropout, SeededDropout) else None,
    )


def _targets(split: SplitModel, lora: LoraConfig) -> str | list[str]:
    if lora.target_modules != (ALL_LINEAR,):
        return list(lora.target_modules)
    if lora.layer_numbers is None:
        return ALL_LINEAR
    # Of certain layers peft takes no "all-linear".
    return sorted({name.rpartition(".")[2] for name in split.block_linears})


def _outer_linears(split: SplitModel) -> list[str] | None:
    """Linears outside the blocks, which get no adapter."""
    modules = split.causal.named_modules()
    linears = {name for name, module in modules if isinstance(module, Linear)}
    return sorted(linears.difference(split.block_linears)) or None


def _require_layers(split: SplitModel, lora: LoraConfig) -> None:
    count = split.causal.config.get_text_config().num_hidden_layers
    if lora.layer_numbers is not None and lora.layer_numbers[-1] >= count:
        raise UsageError(
            f"the model has no layer {lora.layer_numbers[-1]}", field="layers", hint=f"it has 0-{count - 1}"
        )


def _require_targets(split: SplitModel, lora: LoraConfig) -> None:
    """Each name must be that of a module, or its end: of names that match nothing peft says nothing."""
    names = [name for name, _ in split.causal.named_modules()]
    for target in lora.target_modules if lora.target_modules != (ALL_LINEAR,) else ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.rpartition(".")[2] for name in split.block_linears})
            raise UsageError(
                f"the model has no module {target!r}",
                field="target_modules",
                hint=f"use {ALL_LINEAR} alone, or names such as {', '.join(known)}",
            )


def _require_block_linears(model: PeftModel, split: SplitModel) -> None:
    # Another adapter would stay without gradients: the loss and the output head are one step.
    allowed = frozenset(split.block_linears)
    for module_name, module in model.named_modules():
        name = module_name.removeprefix("base_model.model.")
        if isinstance(module, BaseTunerLayer) and name not in allowed:
            raise UsageError(
                f"{name} is no linear of a decoder block",
                field="target_modules",
                hint=f"use {ALL_LINEAR}, or names from `hetrain plan`",
            )


def _require_lora(directory: Path) -> None:
    config = PeftConfig.from_pretrained(str(directory))
    if not isinstance(config, peft.LoraConfig) or config.use_dora:
        raise UsageError(
            "only plain LoRA adapters can be used: others need the matrices that are not here",
            where=str(directory),
        )


def _seed_dropouts(model: PeftModel) -> None:
    for module in model.modules():
        dropouts = getattr(module, "lora_dropout", None)
        if isinstance(dropouts, nn.ModuleDict):
            for name, dropout in dropouts.items():
                if isinstance(dropout, nn.Dropout):
                    dropouts[name] = SeededDropout(dropout.p)
    # The base model's own dropouts stay off: they would draw from the global generator.
    model.eval()
