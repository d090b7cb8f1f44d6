"""Splitting a model: what the client loads, which linears are outsourced, and how they group.

The architecture comes from transformers and is built without weights. Linears inside the decoder's blocks
that are to be outsourced, and the output head, are replaced by `RemoteLinear`; everything else is loaded. A
trial on a few tokens then shows which of them share an input, and that the model gives the same logits, its
norms and gates fused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from transformers import PreTrainedModel

from hetrain.nn.checkpoint_io.checkpoint_names import tensor_names
from hetrain.nn.checkpoint_io.loading import load_kept, skeleton, tensor_of
from hetrain.nn.families import Linear, block_linears, is_transposed, output_head, shape_of
from hetrain.nn.fused import fuse_layers
from hetrain.nn.remote import RemoteLinear
from hetrain.nn.trial_run import shared_inputs
from hetrain.public.errors import ModelError, UsageError, WireError
from hetrain.public.model.files import ModelFiles
from hetrain.public.model.quantization import Scales
from hetrain.public.protocol.plan import Group, Member, Plan, group_of, stack_group

HEAD_ROWS = 8192
"""Outputs of one group of the output head. Its gradient with respect to the hidden states is a sum over the
vocabulary: groups keep the noise of their products, and the memory that these take, small."""


@dataclass(frozen=True)
class SplitModel:
    """The client's part of a model and the plan for the rest.

    Attributes:
        causal: the transformers model; its outsourced linears are `RemoteLinear`, bound to nothing yet.
        plan: what client and workers agree on.
        scales: per group, the scales of its int8 matrix.
        head: those groups of the plan, its last ones, that are slices of the output head; none: it is not
            outsourced.
        block_linears: names of all linears of the decoder's blocks, outsourced or not.
        client_parameters: numbers that the client holds.
        conv1d: whether the blocks have linears whose matrix is stored transposed, as GPT-2's ``Conv1D``.
    """

    causal: PreTrainedModel
    plan: Plan
    scales: dict[str, Scales]
    head: tuple[Group, ...]
    block_linears: tuple[str, ...]
    client_parameters: int
    conv1d: bool

    @property
    def has_tied_head(self) -> bool:
        """Whether the output head's matrix is that of the embeddings."""
        head: torch.Tensor = self.causal.get_output_embeddings().weight
        return head is self.causal.get_input_embeddings().weight

    @property
    def block_groups(self) -> tuple[Group, ...]:
        """The plan's groups of linears inside the decoder's blocks."""
        return self.plan.groups[: len(self.plan.groups) - len(self.head)]


OnMatrix = Callable[[Group, torch.Tensor], None]
"""Called with every group and its int8 matrix [out_features, in_features] while that is at hand."""


def split_model(
    checkpoint: ModelFiles, outsource: Iterable[str] | None = ("*",), on_matrix: OnMatrix | None = None
) -> SplitModel:
    """Loads the client's part of `checkpoint` and plans the rest.

    The outsourced matrices are streamed through once, for their scales, bounds and digests, and not kept.

    Args:
        checkpoint: the whole model.
        outsource: globs (`fnmatch.fnmatchcase`) on full module names, as in ``model.layers.*.mlp.down_proj``.
            Linears of the decoder's blocks that match any are outsourced, and so is the output head if one
            is its name; the others are loaded as they are. None takes all of them, the head included.
        on_matrix: called once with each group's matrix.

    Raises:
        UsageError: a pattern matches no such linear.
        ModelError: the checkpoint lacks a tensor.
        UnsupportedArchitecture: the model has a part that can neither be outsourced nor kept apart.
    """
    causal = skeleton(checkpoint)
    linears = block_linears(causal)
    tensors = tensor_names(causal, checkpoint)
    head = _head(causal, tensors)
    chosen = [*linears, *head] if outsource is None else _matching(linears, head, outsource)
    members = {
        name: _member(name, linears[name], tensor_of(tensors, checkpoint, f"{name}.weight"))
        for name in chosen
        if name in linears
    }
    slices = [
        part
        for name in chosen
        if name in head
        for part in _slices(_member(name, head[name], tensors[f"{name}.weight"]))
    ]
    remotes = {name: _replace(causal, name, (linears | head)[name]) for name in chosen}
    load_kept(causal, checkpoint, tensors)
    causal.eval()
    fuse_layers(causal)
    grouped = [[members[name] for name in names] for names in shared_inputs(causal, remotes)]
    groups, scales = [], {}
    for together in (*grouped, *([one] for one in slices)):
        group, scale = _plan_group(together, checkpoint, on_matrix)
        groups.append(group)
        scales[group.name] = scale
    causal.requires_grad_(False)
    held = {id(p): p.numel() for n, p in causal.named_parameters() if not _is_remote_weight(causal, n)}
    return SplitModel(
        causal=causal,
        plan=Plan(model=checkpoint.label, groups=tuple(groups)),
        scales=scales,
        head=tuple(groups[len(grouped) :]),
        block_linears=tuple(linears),
        client_parameters=sum(held.values()),
        conv1d=any(map(is_transposed, linears.values())),
    )


def _head(causal: PreTrainedModel, tensors: Mapping[str, str]) -> dict[str, Linear]:
    """The output head by its name, if it can be outsourced."""
    found = output_head(causal)
    return {} if found is None or f"{found[0]}.weight" not in tensors else dict([found])


def _slices(member: Member) -> list[Member]:
    """The linear, `HEAD_ROWS` outputs at a time."""
    starts = range(0, member.out_features, HEAD_ROWS)
    widths = (min(HEAD_ROWS, member.out_features - start) for start in starts)
    return [
        member.model_copy(update={"first": start, "out_features": width})
        for start, width in zip(starts, widths, strict=True)
    ]


def _matching(linears: Iterable[str], head: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The linears that match any of the patterns, and the head if one names it, in their order.

    A pattern that takes nothing is refused.
    """
    inside = list(linears)
    known, chosen = [*inside, *head], set()
    for pattern in patterns:
        matches = [name for name in inside if fnmatchcase(name, pattern)]
        matches += [name for name in head if name == pattern]
        if not matches:
            examples = {name.rpartition(".")[2]: name for name in reversed(known)}
            raise UsageError(
                f"{pattern!r} matches no linear of the decoder's blocks, nor the output head",
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
