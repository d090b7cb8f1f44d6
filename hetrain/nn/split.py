"""Splitting a model: what the client loads, which linears are outsourced, and how they group.

The architecture comes from transformers and is built without weights. Linears inside the decoder's blocks
that are to be outsourced are replaced by `RemoteLinear`; everything else is loaded. A trial on a few tokens
then shows which of them share an input, and that the model gives the same logits, its norms and gates fused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from transformers import PreTrainedModel

from hetrain.nn.checkpoint_io.checkpoint_names import tensor_names
from hetrain.nn.checkpoint_io.loading import load_kept, skeleton, tensor_of
from hetrain.nn.families import Linear, block_linears, is_transposed, shape_of
from hetrain.nn.fused import fuse_layers
from hetrain.nn.remote import RemoteLinear
from hetrain.nn.trial_run import shared_inputs
from hetrain.public.errors import ModelError, UsageError, WireError
from hetrain.public.model.files import ModelFiles
from hetrain.public.model.quantization import Scales
from hetrain.public.protocol.plan import Group, Member, Plan, group_of, stack_group


@dataclass(frozen=True)
class SplitModel:
    """The client's part of a model and the plan for the rest.

    Attributes:
        causal: the transformers model; its outsourced linears are `RemoteLinear`, bound to nothing yet.
        plan: what client and workers agree on.
        scales: per group, the scales of its int8 matrix.
        block_linears: names of all linears of the decoder's blocks, outsourced or not.
        client_parameters: numbers that the client holds.
        conv1d: whether the blocks have linears whose matrix is stored transposed, as GPT-2's ``Conv1D``.
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
        on_matrix: called once with each group's matrix.

    Raises:
        UsageError: a pattern matches no linear of the blocks.
        ModelError: the checkpoint lacks a tensor.
        UnsupportedArchitecture: the model has a part that can neither be outsourced nor kept apart.
    """
    causal = skeleton(checkpoint)
    linears = block_linears(causal)
    tensors = tensor_names(causal, checkpoint)
    outsourced = {name: linears[name] for name in _matching(linears, outsource)}
    members = {
        name: _member(name, linear, tensor_of(tensors, checkpoint, f"{name}.weight"))
        for name, linear in outsourced.items()
    }
    remotes = {name: _replace(causal, name, linear) for name, linear in outsourced.items()}
    load_kept(causal, checkpoint, tensors)
    causal.eval()
    fuse_layers(causal)
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
        conv1d=any(map(is_transposed, linears.values())),
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


def _replace(causal: PreTrainedModel, name: str, linear: Linear) -> RemoteLinear:
    remote = RemoteLinear(*shape_of(linear), linear.bias)
    parent, _, leaf = name.rpartition(".")
    setattr(causal.get_submodule(parent), leaf, remote)
    return remote


def _is_remote_weight(causal: PreTrainedModel, parameter: str) -> bool:
    owner, _, leaf = parameter.rpartition(".")
    return leaf == "weight" and isinstance(causal.get_submodule(owner), RemoteLinear)


def _member(name: str, linear: Linear, tensor: str) -> Member:
    return Member(
        module=name,
        tensor=tensor,
        out_features=shape_of(linear)[1],
        transposed=is_transposed(linear),
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
