"""The plan of a job in figures, without starting one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from hetrain.config import AUTO, ComparisonConfig, DataConfig, TrainingConfig
from hetrain.data.dataset import RawRow
from hetrain.data.tokenization import Row, load_tokenizer, tokenize_rows
from hetrain.data.updates import Course
from hetrain.inspection.comparison import Comparison, ModelFacts, Surroundings, count_weights, survey
from hetrain.nn.families import shape_of
from hetrain.nn.split import SplitModel, split_model
from hetrain.public.errors import UsageError
from hetrain.public.lattice.bounds import LARGEST_ENTRY, operand_bound
from hetrain.public.lattice.parameters import SLOTS, parameters_for
from hetrain.public.lattice.result_format import GROUP, ResultFormat
from hetrain.public.model.files import resolve
from hetrain.public.model.quantization import Norms
from hetrain.public.protocol.plan import Group, Plan
from hetrain.public.spelling import starred
from hetrain.secret.engines.rlwe.hints import hint_bytes_of

_FORMAT = ResultFormat(parameters_for(SLOTS))


@dataclass(frozen=True)
class GroupReport:
    """One group: its matrix, the bits that its operands get at least, and bytes per token with full rings."""

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
        outsourced_parameters: parameters that workers hold and the client does not: an output head that is
            the embeddings does not count.
        client_parameters: parameters that the client holds.
        hint_bytes: disk that hints take; a training micro-batch reads all of them once.
        training: the settings that it is for.
        course: what they make of a data set; None without one.
        comparison: the job beside training on this machine; None without a link.
    """

    bytes_up: ClassVar[float] = _FORMAT.operand_bytes(1) / SLOTS
    bytes_down: ClassVar[float] = _FORMAT.result_bytes(GROUP) / GROUP / SLOTS
    ring_slots: ClassVar[int] = SLOTS

    plan: Plan = field(repr=False)
    groups: tuple[GroupReport, ...] = field(repr=False)
    kept: tuple[str, ...] = field(repr=False)
    outsourced_parameters: int
    client_parameters: int
    hint_bytes: int
    training: TrainingConfig = field(repr=False)
    course: Course | None = None
    comparison: Comparison | None = field(default=None, repr=False)

    @property
    def bytes_per_token(self) -> int:
        """Bytes on the wire for a token of training, both passes and both ways."""
        return sum(group.forward_bytes + group.backward_bytes for group in self.groups)

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns that take just these groups: one for alike linears of all layers, else their names."""
        kept = {starred(name) for name in self.kept}
        names = [member.module for group in self.plan.groups for member in group.members]
        patterns = (name if starred(name) in kept else starred(name) for name in names)
        return tuple(dict.fromkeys(patterns))

    @property
    def share(self) -> float:
        """Outsourced share of all parameters."""
        return self.outsourced_parameters / (self.outsourced_parameters + self.client_parameters)


@dataclass(frozen=True)
class DataSet:
    """Rows to learn, not yet tokenized, and which of their tokens are learned."""

    rows: Sequence[RawRow]
    config: DataConfig


def plan_report(
    model: str,
    outsource: Sequence[str],
    training: TrainingConfig,
    dataset: DataSet | None,
    comparison: ComparisonConfig | None = None,
    workers: str | None = None,
) -> PlanReport:
    """Splits `model` and reports.

    Raises:
        UsageError: a pattern has no match, or what is to be measured cannot be.
        ModelError: the model cannot be found, read or split.
        DatasetError: the model's chat template refuses rows, or none is left to learn.
        BrokerError: the broker, against which the link is to be measured, cannot be reached.
    """
    comparison, is_auto = comparison or ComparisonConfig(), AUTO in outsource
    if is_auto and (len(outsource) > 1 or comparison.link is None):
        raise UsageError(
            "auto needs a link to judge groups by, and no other pattern beside it",
            field="outsource",
            hint="give `link`, as in 1gbit, and auto alone",
        )
    files = resolve(model)
    course = None
    if dataset is not None:
        rows = tokenize_rows(dataset.rows, load_tokenizer(files), training.longest_row, dataset.config)
        course = Course.of(rows, training)
    split = split_model(files, None if is_auto else outsource)
    report = _report(split, split.plan, training, course)
    if comparison.link is None:
        return report
    surroundings = survey(files, _facts(split, report), comparison, training, course, workers)
    return _compared(split, report, surroundings, choosing=is_auto)


def report_of(split: SplitModel, training: TrainingConfig, rows: Sequence[Row]) -> PlanReport:
    """The report of a model that is split already, and of a training on `rows`."""
    return _report(split, split.plan, training, Course.of(rows, training))


def _report(split: SplitModel, plan: Plan, training: TrainingConfig, course: Course | None) -> PlanReport:
    """The report for a part of the groups that `split` has, or all."""
    leaving = {member.module for group in plan.groups for member in group.members}
    shared = set(split.head) if split.has_tied_head else set()
    all_weights, weights = (
        count_weights([g for g in each.groups if g not in shared]) for each in (split.plan, plan)
    )
    return PlanReport(
        plan=plan,
        groups=tuple(_group_report(group) for group in plan.groups),
        kept=tuple(name for name in split.block_linears if name not in leaving),
        outsourced_parameters=weights,
        client_parameters=split.client_parameters + all_weights - weights,
        hint_bytes=hint_bytes_of(plan),
        training=training,
        course=course,
    )


def _compared(
    split: SplitModel, report: PlanReport, surroundings: Surroundings, *, choosing: bool
) -> PlanReport:
    """`report` with a comparison, of the groups that pay if they are to be chosen."""
    if choosing:
        plan = Plan(model=split.plan.model, groups=surroundings.choose(split.plan.groups))
        report = _report(split, plan, report.training, report.course)
    return replace(report, comparison=surroundings.compare(report.plan.groups))


def _facts(split: SplitModel, report: PlanReport) -> ModelFacts:
    embeddings = split.causal.get_input_embeddings().weight
    linears = [shape_of(split.causal.get_submodule(name)) for name in split.block_linears]
    head = count_weights(split.head)
    return ModelFacts(
        parameters=report.outsourced_parameters + report.client_parameters,
        linear_weights=sum(k * n for k, n in linears),
        vocabulary=split.causal.config.get_text_config().vocab_size,
        stored_bytes=embeddings.element_size(),
        head=split.head[0].members[0].module if split.head else "",
        head_weights=0 if split.has_tied_head else head,
    )


def _group_report(group: Group) -> GroupReport:
    k, n = group.in_features, group.out_features
    return GroupReport(
        group=group,
        forward_bits=_operand_bits(group.forward, group.out_features),
        backward_bits=_operand_bits(group.backward, group.in_features),
        forward_bytes=_bytes_per_token(k, n),
        backward_bytes=_bytes_per_token(n, k),
    )


def _bytes_per_token(k: int, n: int) -> int:
    return (_FORMAT.operand_bytes(k) + _FORMAT.result_bytes(n)) // SLOTS


def _operand_bits(norms: Norms, rows: int) -> float:
    """log2 of the levels that the first of both bounds leaves."""
    return math.log2(2 * min(operand_bound(norms, rows).largest, LARGEST_ENTRY) + 1)
