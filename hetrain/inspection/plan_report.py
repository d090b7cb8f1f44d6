"""The plan of a job in figures, without starting one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from hetrain.nn.split import split_model
from hetrain.public.lattice.parameters import SLOTS, parameters_for
from hetrain.public.lattice.result_format import ResultFormat, largest_operand
from hetrain.public.model.files import resolve
from hetrain.public.protocol.plan import Group, Plan
from hetrain.secret.engines.rlwe.hints import hint_bytes

_FULL, _HINTED = (ResultFormat(parameters_for(SLOTS), has_mask_product=has) for has in (True, False))


@dataclass(frozen=True)
class GroupReport:
    """One group: its matrix, the bits of precision its operands get, and bytes per token with full rings."""

    group: Group
    forward_bits: float
    backward_bits: float
    forward_bytes: int
    backward_bytes: int


@dataclass(frozen=True)
class PlanReport:
    """What would be outsourced.

    Attributes:
        plan: the groups, as workers would agree to them.
        groups: the same with their costs.
        kept: linears of decoder blocks that stay on the client.
        outsourced_parameters: parameters that workers hold.
        client_parameters: parameters that the client holds.
        hint_bytes: disk that a job's hints take.
    """

    bytes_up: ClassVar[int] = _FULL.operand_bytes(1) // SLOTS
    bytes_down: ClassVar[int] = _FULL.row_bytes // SLOTS
    hinted_bytes_down: ClassVar[int] = _HINTED.row_bytes // SLOTS
    ring_slots: ClassVar[int] = SLOTS

    plan: Plan = field(repr=False)
    groups: tuple[GroupReport, ...] = field(repr=False)
    kept: tuple[str, ...] = field(repr=False)
    outsourced_parameters: int
    client_parameters: int
    hint_bytes: int

    @property
    def share(self) -> float:
        """Outsourced share of all parameters."""
        return self.outsourced_parameters / (self.outsourced_parameters + self.client_parameters)


def plan_report(model: str, outsource: Sequence[str]) -> PlanReport:
    """Splits `model` and reports. Raises `UsageError` for a pattern without a match, and `ModelError`."""
    split = split_model(resolve(model), outsource)
    leaving = {member.module for group in split.plan.groups for member in group.members}
    return PlanReport(
        plan=split.plan,
        groups=tuple(_group_report(group) for group in split.plan.groups),
        kept=tuple(name for name in split.block_linears if name not in leaving),
        outsourced_parameters=sum(group.in_features * group.out_features for group in split.plan.groups),
        client_parameters=split.client_parameters,
        hint_bytes=hint_bytes(split.plan),
    )


def _group_report(group: Group) -> GroupReport:
    k, n = group.in_features, group.out_features
    return GroupReport(
        group=group,
        forward_bits=_operand_bits(group.forward_l1),
        backward_bits=_operand_bits(group.backward_l1),
        forward_bytes=PlanReport.bytes_up * k + PlanReport.bytes_down * n,
        backward_bytes=PlanReport.bytes_up * n + PlanReport.bytes_down * k,
    )


def _operand_bits(l1: int) -> float:
    """log2 of the levels between -x_max and x_max."""
    return math.log2(2 * largest_operand(parameters_for(SLOTS), l1) + 1)
