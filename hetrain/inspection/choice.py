"""Which groups pay when they leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

from hetrain.public.protocol.plan import Group


@dataclass(frozen=True)
class Judgement:
    """What a choice of groups makes of a job: its seconds, and the bytes of memory that the client takes."""

    seconds: float
    memory: float


def choose(
    groups: Sequence[Group], judge: Callable[[tuple[Group, ...]], Judgement], limit: float
) -> tuple[Group, ...]:
    """The groups to outsource, in the plan's order.

    For a group of K inputs and n outputs all that leaving costs grows with K + n (bytes, encryption), and all
    that it saves with K·n (products, memory of weights). So groups leave in the order of K·n / (K + n), the
    largest first, and equal ones in the plan's order; what is chosen is how many. That is the best choice
    where all groups are equal, and otherwise falls short of it by less than one group. Slices of one linear
    leave together.

    Args:
        groups: of the plan.
        judge: the job in which the given groups leave.
        limit: bytes of memory. Where no number of groups fits, the one that takes the least is chosen.

    Returns:
        Of all numbers of groups that fit, those of the fastest job; the fewest of equally fast ones.
    """
    units = [tuple(slices) for _, slices in groupby(groups, key=lambda group: group.members[0].module)]
    order = sorted(range(len(units)), key=lambda index: -_gain(units[index][0]))
    prefixes = [
        tuple(chain.from_iterable(units[index] for index in sorted(order[:count])))
        for count in range(len(units) + 1)
    ]
    judged = [(prefix, judge(prefix)) for prefix in prefixes]
    fitting = [(prefix, each) for prefix, each in judged if each.memory <= limit]
    if not fitting:
        return min(judged, key=lambda pair: pair[1].memory)[0]
    return min(fitting, key=lambda pair: pair[1].seconds)[0]


def _gain(group: Group) -> float:
    k, n = group.in_features, group.out_features
    return k * n / (k + n)
