"""Splitting a model: what the client loads, which linears leave, and how they group.

The architecture comes from transformers and is built without weights. Linears inside the decoder's blocks
that are to be outsourced are replaced by `RemoteLinear`; everything else is loaded. A trial on a few tokens
then shows which of them share an input, and that the model stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hetrain.nn.checkpoint_io.checkpoint_names import tensor_names
from hetrain.nn.checkpoint_io.loading import load_kept, skeleton, tensor_of
from hetrain.nn.remote import RemoteLinear
from hetrain.nn.trial_run import shared_inputs
from hetrain.public.errors import ModelError, UnsupportedArchitecture, UsageError, WireError
from hetrain.public.model.files import ModelFiles
from hetrain.public.model.quantization import Scales
from hetrain.public.protocol.plan import Group, Member, Plan, group_of, stack_group

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
        block_linears: names of all linears of the decoder's blocks, outsourced or not.
        client_parameters: numbers that the client holds.
        conv1d: whether the linears of the blocks were GPT-2's ``Conv1D``.
    """

    causal: PreTrainedModel
    plan: Plan
    scales: dict[str, Scales]
    block_linears: tuple[str, ...]
    client_parameters: int
    conv1d: bool


OnMatrix = Callable[[Group, torch.Tensor], None]
"""Called with every group and its int8 matrix [out_features, in_features] while that is at hand."""


def split_model(
    checkpoint: ModelFiles, outsource: Iterable[str] = ("*",), on_matrix: OnMatrix | None = None
) -> SplitModel:
    """Loads the client's part of `checkpoint` and plans the rest.

    The outsourced matrices are streamed through once, for their scales, bounds and digests, and not kept.

    Args:
        checkpoint: the whole model.
        outsource: globs (`fnmatch.fnmatchcase`) on full module names, as in ``model.layers.*.mlp.down_proj``.
            Linears of the decoder's blocks that match any are outsourced; the others are loaded as they are.
        on_matrix: sees every matrix once.

    Raises:
        UsageError: a pattern matches no linear of the blocks.
        ModelError: the checkpoint lacks a tensor.
        UnsupportedArchitecture: the model has a part that can neither be outsourced nor kept apart.
    """
    causal = skeleton(checkpoint)
    linears = dict(_block_linears(causal))
    _refuse_layer_types(causal)
    tensors = tensor_names(causal, checkpoint)
    leaving = {name: linears[name] for name in _matching(linears, outsource)}
    members = {
        name: _member(name, linear, tensor_of(tensors, checkpoint, f"{name}.weight"))
        for name, linear in leaving.items()
    }
    remotes = {name: _replace(causal, name, linear) for name, linear in leaving.items()}
    load_kept(causal, checkpoint, tensors)
    causal.eval()
    groups, scales = [], {}
    for names in shared_inputs(causal, remotes):
        group, scale = _plan_group([members[name] for name in names], checkpoint, on_matrix)
        groups.append(group)
        scales[group.name] = scale
    causal.requires_grad_(False)
    held = {id(p): p.numel() for n, p in causal.named_parameters() if not _is_remote_weight(causal, n)}
    return SplitModel(
        causal=causal,
        plan=Plan(model=checkpoint.label, groups=tuple(groups)),
        scales=scales,
        block_linears=tuple(linears),
        client_parameters=sum(held.values()),
        conv1d=any(isinstance(linear, Conv1D) for linear in linears.values()),
    )


def _matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that match any of the patterns, in their order; refuses a pattern that matches none."""
    known, chosen = list(names), set()
    for pattern in patterns:
        matches = [name for name in known if fnmatchcase(name, pattern)]
        if not matches:
            examples = {name.rpartition(".")[2]: name for name in reversed(known)}
            raise UsageError(
                f"{pattern!r} matches no linear of the decoder's blocks",
                field="outsource",
                hint=f"patterns match whole names, here {', '.join(sorted(examples.values()))} and those of "
                "the other blocks; `hetrain plan` shows what a pattern takes",
            )
        chosen.update(matches)
    return [name for name in known if name in chosen]


def _refuse_layer_types(causal: PreTrainedModel) -> None:
    for index, kind in enumerate(getattr(causal.config, "layer_types", None) or ()):
        if kind not in _LAYER_TYPES:
            raise UnsupportedArchitecture(
                f"layer {index} is of type {kind!r}", where=type(causal.base_model).__name__, hint=_BLOCK_HINT
            )


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


def _member(name: str, linear: nn.Linear | Conv1D, tensor: str) -> Member:
    transposed = isinstance(linear, Conv1D)
    return Member(
        module=name,
        tensor=tensor,
        out_features=linear.nf if isinstance(linear, Conv1D) else linear.out_features,
        transposed=transposed,
    )


def _plan_group(
    members: list[Member], checkpoint: ModelFiles, on_matrix: OnMatrix | None
) -> tuple[Group, Scales]:
    try:
        matrix = stack_group(tuple(members), checkpoint.read)
    except WireError as error:
        raise ModelError(error.what, where=error.where) from error
    group = group_of(tuple(members), matrix.values)
    if on_matrix is not None:
        on_matrix(group, matrix.values)
    return group, matrix.scales
