"""The plan: what a job outsources. Client and workers agree on it before the first ciphertext travels."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from hetrain.public.errors import WireError
from hetrain.public.model.quantization import Norms, QuantizedMatrix, matrix_digest, norms_of, quantize
from hetrain.public.protocol.messages import VERSION, Name, Token, parse

MAX_PLAN_BYTES = 4 << 20
Size = Annotated[int, Field(ge=1, le=1 << 24)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Member(_Part):
    """One linear of a group, or a slice of its outputs: its module, its tensor in the checkpoint, its width.

    `transposed` says that the checkpoint stores [in, out] (GPT-2's ``Conv1D``) instead of [out, in]. `first`
    is the linear's output that is the slice's first one.
    """

    module: Name
    tensor: Name
    out_features: Size
    transposed: bool = False
    first: Annotated[int, Field(ge=0, lt=1 << 24)] = 0

    @property
    def end(self) -> int:
        """The linear's output after the last one."""
        return self.first + self.out_features


class Group(_Part):
    """Linears that share one input: encrypted once, evaluated in one task, one dx on the way back.

    Their int8 matrices are stacked along the output dimension: Q [out_features, in_features].
    `forward` and `backward` bound products with Q and with Qᵀ.
    """

    name: Name
    members: tuple[Member, ...] = Field(min_length=1, strict=False)
    in_features: Size
    forward: Norms
    backward: Norms
    digest: Token

    @property
    def out_features(self) -> int:
        return sum(member.out_features for member in self.members)


def group_of(members: tuple[Member, ...], values: torch.Tensor) -> Group:
    """The group of linears whose stacked int8 matrix is `values` [out_features, in_features].

    It goes by the name of its first module, and a slice by its first output, too.
    """
    forward, backward = norms_of(values)
    first = members[0]
    return Group(
        name=f"{first.module}/{first.first}" if first.first else first.module,
        members=members,
        in_features=values.shape[1],
        forward=forward,
        backward=backward,
        digest=matrix_digest(values),
    )


class Plan(_Part):
    """All groups of one model, in the order in which a forward pass meets them."""

    version: Literal[2] = VERSION
    model: Name
    groups: tuple[Group, ...] = Field(strict=False)

    def to_bytes(self) -> bytes:
        """Canonical JSON: what travels, and what the digest covers."""
        return self.model_dump_json().encode()

    @property
    def digest(self) -> str:
        """SHA-256 of `to_bytes`, in hexadecimal."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def parse_plan(data: bytes | bytearray | memoryview, digest: str) -> Plan:
    """Parses a plan that came over the wire and checks that it is the one announced.

    Raises:
        WireError: it is larger than `MAX_PLAN_BYTES`, its digest differs, it is malformed, or two groups
            share a name or a tensor's rows.
    """
    if len(data) > MAX_PLAN_BYTES:
        raise WireError(
            f"the plan has {len(data)} bytes, of {MAX_PLAN_BYTES} at most", hint="outsource fewer groups"
        )
    raw = bytes(data)
    if hashlib.sha256(raw).hexdigest() != digest:
        raise WireError("the plan is not the one that was announced: its digest differs")
    plan = parse(Plan, raw, where="plan")
    if len({group.name for group in plan.groups}) != len(plan.groups):
        raise WireError("two groups of the plan share a name")
    if _overlap(member for group in plan.groups for member in group.members):
        raise WireError("two linears of the plan share rows of a tensor")
    return plan


def _overlap(members: Iterable[Member]) -> bool:
    ranges: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for member in members:
        ranges[member.tensor].append((member.first, member.end))
    return any(low[1] > high[0] for each in ranges.values() for low, high in pairwise(sorted(each)))


def check_shapes(group: Group, shape_of: Callable[[str], tuple[int, ...]]) -> None:
    """Raises `WireError` unless a checkpoint's tensors, by name, have the rows and columns of `group`."""
    for member in group.members:
        shape = shape_of(member.tensor)
        outputs, inputs = (shape[::-1] if member.transposed else shape) if len(shape) == 2 else (0, 0)
        if outputs < member.end or inputs != group.in_features:
            raise WireError(
                f"tensor {member.tensor} has shape {'×'.join(map(str, shape))}, the plan says "
                f"{member.end} outputs and {group.in_features} inputs",
                where=member.module,
            )


def stack_group(members: tuple[Member, ...], read_tensor: Callable[[str], torch.Tensor]) -> QuantizedMatrix:
    """Reads, stacks and quantises the matrices of a group's members: Q [out_features, in_features].

    Args:
        members: the group's linears, in order.
        read_tensor: gives a checkpoint tensor by name.

    Raises:
        WireError: a tensor is not a matrix of the width that the plan says.
        ModelError: a tensor has values that are not finite.
    """
    parts = []
    for member in members:
        weight = read_tensor(member.tensor)
        if weight.dim() != 2:
            raise WireError(
                f"tensor {member.tensor} has {weight.dim()} dimensions, not 2", where=member.module
            )
        part = weight.t() if member.transposed else weight
        if part.shape[0] < member.end:
            raise WireError(
                f"tensor {member.tensor} has {part.shape[0]} output channels, the plan says {member.end}",
                where=member.module,
            )
        parts.append(part[member.first : member.end])
    if len({part.shape[1] for part in parts}) != 1:
        raise WireError("the members of a group differ in their input width", where=members[0].module)
    return quantize(torch.cat(parts))
