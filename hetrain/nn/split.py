"""Splitting a model: what the client loads, which linears leave, and how they group.

The architecture comes from transformers and is built without weights. Linears inside the decoder's blocks are
replaced by `RemoteLinear`; everything else is loaded. A forward pass of a few tokens then shows which of them
share an input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hetrain.nn.attention import IMPLEMENTATION, RowLayout
from hetrain.nn.remote import RemoteLinear, Tracer
from hetrain.public.checkpoints import Checkpoint
from hetrain.public.errors import ModelError, UnsupportedArchitecture, WireError
from hetrain.public.plan import Group, Member, Plan, stack_group
from hetrain.public.weights import matrix_digest, max_l1

_TRACE_ROWS = (3, 2)


@dataclass(frozen=True)
class SplitModel:
    """The client's part of a model and the plan for the rest.

    Attributes:
        causal: the transformers model; its outsourced linears are `RemoteLinear`, bound to nothing yet.
        plan: what client and workers agree on.
        scales: per group, the float32 scale of each output channel [out_features].
        client_parameters: numbers that the client holds.
        conv1d: whether the outsourced linears were GPT-2's ``Conv1D``.
    """

    causal: PreTrainedModel
    plan: Plan
    scales: dict[str, torch.Tensor]
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
    remotes = {name: _replace(causal, name, linear) for name, linear in originals.items()}
    _load_rest(causal, checkpoint)
    grouped = _trace(causal, remotes)
    groups, scales = [], {}
    for names in grouped:
        group, scale = _plan_group([_member(causal, checkpoint, name, originals[name]) for name in names], checkpoint)
        groups.append(group)
        scales[group.name] = scale
    causal.eval()
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
    try:
        config = AutoConfig.from_pretrained(checkpoint.directory)
        # Buffers (rotary frequencies, for one) are computed for real: no checkpoint has them.
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(
                config, attn_implementation=IMPLEMENTATION, dtype=torch.float32
            )
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise UnsupportedArchitecture(
            f"transformers cannot build this model with row-wise attention: {error}",
            where=checkpoint.label,
            hint="only decoder-only language models can be split",
        ) from error


def _block_linears(causal: PreTrainedModel) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """Names and modules of the linears inside the decoder's blocks; refuses what it cannot split."""
    found = False
    prefix = _base_prefix(causal)
    for list_name, blocks in causal.base_model.named_modules(prefix=prefix):
        if not isinstance(blocks, nn.ModuleList):
            continue
        for name, module in blocks.named_modules(prefix=list_name):
            if isinstance(module, nn.Linear | Conv1D):
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


def _refuse_hidden_matrix(name: str, module: nn.Module) -> None:
    for parameter_name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() >= 2 and not isinstance(module, nn.Embedding):
            raise UnsupportedArchitecture(
                f"parameter {parameter_name!r} of shape {tuple(parameter.shape)} in a {type(module).__name__} "
                "is neither an nn.Linear nor a Conv1D",
                where=name,
                hint="mixtures of experts, convolutions and state-space blocks cannot be split yet",
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


def _load_rest(causal: PreTrainedModel, checkpoint: Checkpoint) -> None:
    causal.tie_weights()
    for name, parameter in list(causal.named_parameters()):
        if parameter.is_meta:
            value = checkpoint.read(_tensor_name(causal, checkpoint, name)).to(torch.float32)
            if value.shape != parameter.shape:
                raise ModelError(
                    f"tensor {name} has shape {tuple(value.shape)}, the architecture says {tuple(parameter.shape)}",
                    where=str(checkpoint.directory),
                )
            owner, _, leaf = name.rpartition(".")
            setattr(causal.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    causal.tie_weights()


def _tensor_name(causal: PreTrainedModel, checkpoint: Checkpoint, parameter: str) -> str:
    """The checkpoint's name for a parameter: base models are saved with or without their prefix."""
    bare = parameter.removeprefix(_base_prefix(causal) + ".")
    for candidate in (parameter, bare):
        if candidate in checkpoint.tensors:
            return candidate
    raise ModelError(
        f"the checkpoint has no tensor {parameter}",
        where=str(checkpoint.directory),
        hint="its names differ from those of the architecture in config.json",
    )


def _member(
    causal: PreTrainedModel, checkpoint: Checkpoint, name: str, linear: nn.Linear | Conv1D
) -> Member:
    transposed = isinstance(linear, Conv1D)
    return Member(
        module=name,
        tensor=_tensor_name(causal, checkpoint, f"{name}.weight"),
        out_features=linear.nf if isinstance(linear, Conv1D) else linear.out_features,
        transposed=transposed,
    )


def _plan_group(members: list[Member], checkpoint: Checkpoint) -> tuple[Group, torch.Tensor]:
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


def _trace(causal: PreTrainedModel, remotes: dict[str, RemoteLinear]) -> list[list[str]]:
    """Names of the linears that share an input, group by group in order of evaluation."""
    tracer, names = Tracer(), list(remotes)
    for index, name in enumerate(names):
        tracer.watch(index, remotes[name])
    positions = torch.cat([torch.arange(length) for length in _TRACE_ROWS])[None]
    with torch.inference_mode():
        hidden_states(causal, torch.zeros_like(positions), positions, RowLayout.of(_TRACE_ROWS))
    for remote in remotes.values():
        remote.group = None
    groups = tracer.groups()
    calls = [index for members in groups for index in members]
    for index, name in enumerate(names):
        if calls.count(index) != 1:
            raise UnsupportedArchitecture(
                f"this linear is evaluated {calls.count(index)} times in a forward pass instead of once",
                where=name,
                hint="routed or shared layers cannot be split yet",
            )
    if not any(getattr(module, "row_attention_seen", False) for module in causal.modules()):
        raise UnsupportedArchitecture(
            "its attention does not use transformers' attention interface, so packed rows would see each other",
            where=type(causal.base_model).__name__,
        )
    return [[names[index] for index in members] for members in groups]


def hidden_states(
    causal: PreTrainedModel, tokens: torch.Tensor, positions: torch.Tensor, layout: RowLayout
) -> torch.Tensor:
    """The decoder's last hidden states [1, T, hidden] for packed rows; tokens and positions int64 [1, T]."""
    output = causal.base_model(
        input_ids=tokens, position_ids=positions, use_cache=False, row_layout=layout, return_dict=True
    )
    states: torch.Tensor = output.last_hidden_state
    return states
