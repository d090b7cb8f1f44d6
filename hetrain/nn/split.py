"""Splitting a model: what the client loads, which linears leave, and how they group.

The architecture comes from transformers and is built without weights. Linears inside the decoder's blocks are
replaced by `RemoteLinear`; everything else is loaded. A trial on a few tokens then shows which of them share
an input, and that the model stays what it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers import __version__ as _VERSION
from transformers.pytorch_utils import Conv1D

from hetrain.nn.attention import IMPLEMENTATION
from hetrain.nn.names import tensor_names
from hetrain.nn.remote import RemoteLinear
from hetrain.nn.trace import NO_INTERFACE, shared_inputs
from hetrain.public.checkpoints import Checkpoint
from hetrain.public.errors import ModelError, UnsupportedArchitecture, WireError
from hetrain.public.plan import Group, Member, Plan, stack_group
from hetrain.public.weights import Scales, matrix_digest, max_l1

# Layers that `row_attention` computes. Others may look like these on the few tokens of a trial.
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_BLOCK_HINT = "mixtures of experts, convolutions and state-space blocks cannot be split yet"


@dataclass(frozen=True)
class SplitModel:
    """The client's part of a model and the plan for the rest.

    Attributes:
        causal: the transformers model; its outsourced linears are `RemoteLinear`, bound to nothing yet.
        plan: what client and workers agree on.
        scales: per group, the scales of its int8 matrix.
        client_parameters: numbers that the client holds.
        conv1d: whether the outsourced linears were GPT-2's ``Conv1D``.
    """

    causal: PreTrainedModel
    plan: Plan
    scales: dict[str, Scales]
    client_parameters: int
    conv1d: bool


def split_model(checkpoint: Checkpoint) -> SplitModel:
    """Loads the client's part of `checkpoint` and plans the rest.

    The outsourced matrices are streamed through once, for their scales, bounds and digests, and not kept.

    Raises:
        ModelError: the checkpoint lacks a tensor.
        UnsupportedArchitecture: the model has a part that can neither be outsourced nor kept apart.
    """
    causal = _skeleton(checkpoint)
    originals = dict(_block_linears(causal))
    _refuse_layer_types(causal)
    tensors = tensor_names(causal, checkpoint)
    members = {
        name: _member(name, linear, _tensor(tensors, checkpoint, f"{name}.weight"))
        for name, linear in originals.items()
    }
    remotes = {name: _replace(causal, name, linear) for name, linear in originals.items()}
    _load_rest(causal, checkpoint, tensors)
    causal.eval()
    groups, scales = [], {}
    for names in shared_inputs(causal, remotes):
        group, scale = _plan_group([members[name] for name in names], checkpoint)
        groups.append(group)
        scales[group.name] = scale
    causal.requires_grad_(False)
    held = {id(p): p.numel() for n, p in causal.named_parameters() if not _is_remote_weight(causal, n)}
    return SplitModel(
        causal=causal,
        plan=Plan(model=checkpoint.label, groups=tuple(groups)),
        scales=scales,
        client_parameters=sum(held.values()),
        conv1d=any(isinstance(linear, Conv1D) for linear in originals.values()),
    )


def _skeleton(checkpoint: Checkpoint) -> PreTrainedModel:
    config = _config(checkpoint)
    try:
        # Buffers (rotary frequencies, for one) are computed for real: no checkpoint has them.
        with init_empty_weights(include_buffers=False):
            causal = AutoModelForCausalLM.from_config(
                config, attn_implementation=IMPLEMENTATION, dtype=torch.float32
            )
    except (ValueError, OSError, KeyError, AttributeError, ImportError) as error:
        # Older architectures look their attention up in a table of their own.
        reason = (
            NO_INTERFACE
            if error.args == (IMPLEMENTATION,)
            else f"transformers {_VERSION} cannot build it: {_first_line(error)}"
        )
        raise UnsupportedArchitecture(
            reason,
            where=", ".join(config.architectures or [type(config).__name__]),
            hint="only decoder-only language models can be split",
        ) from error
    causal.tie_weights()
    return causal


def _config(checkpoint: Checkpoint) -> PretrainedConfig:
    where = str(checkpoint.directory / "config.json")
    try:
        config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ModelError(
            f"transformers {_VERSION} cannot use it: {_first_line(error)}", where=where
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedArchitecture(
            "the checkpoint is quantised already",
            where=where,
            hint="give the original weights: bf16, fp16 or fp32",
        )
    return config


def _refuse_layer_types(causal: PreTrainedModel) -> None:
    for index, kind in enumerate(getattr(causal.config, "layer_types", None) or ()):
        if kind not in _LAYER_TYPES:
            raise UnsupportedArchitecture(
                f"layer {index} is of type {kind!r}", where=type(causal.base_model).__name__, hint=_BLOCK_HINT
            )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _block_linears(causal: PreTrainedModel) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """Names and modules of the linears inside the decoder's blocks; refuses what it cannot split."""
    found = False
    prefix = _base_prefix(causal)
    for list_name, blocks in causal.base_model.named_modules(prefix=prefix):
        if not isinstance(blocks, nn.ModuleList):
            continue
        for name, module in blocks.named_modules(prefix=list_name):
            if isinstance(module, nn.Linear | Conv1D):
                _refuse_own_product(name, module)
                found = True
                yield name, module
            else:
                _refuse_hidden_matrix(name, module)
    if not found:
        raise UnsupportedArchitecture(
            "no nn.Linear or Conv1D inside a list of decoder blocks", where=type(causal).__name__
        )


def _base_prefix(causal: PreTrainedModel) -> str:
    return next(name for name, module in causal.named_modules() if module is causal.base_model)


def _refuse_own_product(name: str, module: nn.Module) -> None:
    if type(module).forward not in (nn.Linear.forward, Conv1D.forward):
        raise UnsupportedArchitecture(
            f"{type(module).__name__} computes its product in its own way", where=name
        )


def _refuse_hidden_matrix(name: str, module: nn.Module) -> None:
    for parameter_name, parameter in module.named_parameters(recurse=False):
        # Some norms have one row per attention head.
        if (
            parameter.dim() >= 2
            and not isinstance(module, nn.Embedding)
            and "Norm" not in type(module).__name__
        ):
            raise UnsupportedArchitecture(
                f"parameter {parameter_name!r} of shape {tuple(parameter.shape)} "
                f"in a {type(module).__name__} is neither an nn.Linear nor a Conv1D",
                where=name,
                hint=_BLOCK_HINT,
            )


def _replace(causal: PreTrainedModel, name: str, linear: nn.Linear | Conv1D) -> RemoteLinear:
    if isinstance(linear, Conv1D):
        in_features, out_features = linear.nx, linear.nf
    else:
        in_features, out_features = linear.in_features, linear.out_features
    remote = RemoteLinear(in_features, out_features, linear.bias)
    parent, _, leaf = name.rpartition(".")
    setattr(causal.get_submodule(parent), leaf, remote)
    return remote


def _is_remote_weight(causal: PreTrainedModel, parameter: str) -> bool:
    owner, _, leaf = parameter.rpartition(".")
    return leaf == "weight" and isinstance(causal.get_submodule(owner), RemoteLinear)


def _load_rest(causal: PreTrainedModel, checkpoint: Checkpoint, tensors: Mapping[str, str]) -> None:
    for name, parameter in list(causal.named_parameters()):
        if parameter.is_meta:
            value = _read(checkpoint, _tensor(tensors, checkpoint, name), parameter)
            owner, _, leaf = name.rpartition(".")
            setattr(causal.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    causal.tie_weights()
    for name, buffer in causal.named_buffers():
        if name in tensors:
            buffer.copy_(_read(checkpoint, tensors[name], buffer))


def _read(checkpoint: Checkpoint, tensor: str, like: torch.Tensor) -> torch.Tensor:
    value = checkpoint.read(tensor)
    if value.shape != like.shape:
        raise ModelError(
            f"tensor {tensor} has shape {tuple(value.shape)}, the architecture says {tuple(like.shape)}",
            where=str(checkpoint.directory),
        )
    return value.to(like.dtype)


def _tensor(tensors: Mapping[str, str], checkpoint: Checkpoint, name: str) -> str:
    if name not in tensors:
        raise ModelError(
            f"the checkpoint has no tensor {name}",
            where=str(checkpoint.directory),
            hint="its names differ from those of the architecture in config.json",
        )
    return tensors[name]


def _member(name: str, linear: nn.Linear | Conv1D, tensor: str) -> Member:
    transposed = isinstance(linear, Conv1D)
    return Member(
        module=name,
        tensor=tensor,
        out_features=linear.nf if isinstance(linear, Conv1D) else linear.out_features,
        transposed=transposed,
    )


def _plan_group(members: list[Member], checkpoint: Checkpoint) -> tuple[Group, Scales]:
    try:
        matrix = stack_group(tuple(members), checkpoint.read)
    except WireError as error:
        raise ModelError(error.what, where=error.where) from error
    rows, columns = max_l1(matrix.values)
    group = Group(
        name=members[0].module,
        members=tuple(members),
        in_features=matrix.values.shape[1],
        forward_l1=rows,
        backward_l1=columns,
        digest=matrix_digest(matrix.values),
    )
    return group, matrix.scales
