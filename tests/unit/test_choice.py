"""Which groups pay: against every subset, and how the choice moves with link and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, pairwise, product

import pytest

from hetrain.inspection.choice import Judgement, choose
from hetrain.public.model.quantization import Norms
from hetrain.public.protocol.plan import Group, Member

LINKS = (1e3, 1e5, 1e6, 1e7, 1e8, 1e9, 1e12)
LIMITS = (0.0, 2e4, 1e5, 2e5, 1e9)
SHAPES = ((16, 16), (64, 64), (16, 256))
MEMBER_S, WEIGHT_S, VALUE_S, FIXED_S = 1e-6, 1e-7, 2e-6, 1e-4


def group(index: int, k: int, n: int) -> Group:
    member = Member(module=f"g{index}", tensor=f"g{index}", out_features=n)
    norms = Norms(l1=16, squares=16)
    return Group(
        name=f"g{index}", members=(member,), in_features=k, forward=norms, backward=norms, digest="0" * 64
    )


def groups_of(shapes: Sequence[tuple[int, int]]) -> tuple[Group, ...]:
    return tuple(group(index, k, n) for index, (k, n) in enumerate(shapes))


def weights(groups: Sequence[Group]) -> int:
    return sum(each.in_features * each.out_features for each in groups)


def judge_of(
    groups: Sequence[Group], link: float, at_once: int = 2
) -> Callable[[tuple[Group, ...]], Judgement]:
    """A job as `hetrain.inspection.estimate` has it: kept weights and encrypted values cost time here."""

    def judge(chosen: tuple[Group, ...]) -> Judgement:
        values, kept = (
            sum(each.in_features + each.out_features for each in chosen),
            weights(groups) - weights(chosen),
        )
        up, down, client = (
            24 * values / link,
            14 * values / link,
            FIXED_S + WEIGHT_S * kept + VALUE_S * values,
        )
        return Judgement(max(up, down, client, (up + down + client) / at_once), 4.0 * kept)

    return judge


def subsets(groups: Sequence[Group]) -> Iterator[tuple[Group, ...]]:
    for count in range(len(groups) + 1):
        yield from combinations(groups, count)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [0, 1, 5])
def test_of_equal_groups_no_subset_is_better(shape: tuple[int, int], count: int) -> None:
    groups = groups_of([shape] * count)
    for link, limit, at_once in product(LINKS, LIMITS, (1, 2, 8)):
        judge = judge_of(groups, link, at_once)
        chosen = judge(choose(groups, judge, limit))
        for other in map(judge, subsets(groups)):
            if other.memory <= limit:
                assert chosen.memory <= limit
                assert chosen.seconds <= other.seconds * (1 + 1e-12)
            else:
                assert chosen.memory <= max(limit, other.memory)


@pytest.mark.parametrize("shapes", list(product(SHAPES, repeat=4)))
def test_of_unequal_ones_the_best_is_missed_by_less_than_a_group(shapes: Sequence[tuple[int, int]]) -> None:
    groups = groups_of(shapes)
    for link in LINKS:
        judge = judge_of(groups, link)
        best = min(judge(each).seconds for each in subsets(groups))
        costs = [
            38 * sum(shape) / link + VALUE_S * sum(shape) + WEIGHT_S * shape[0] * shape[1] for shape in shapes
        ]
        assert judge(choose(groups, judge, 1e9)).seconds <= best + max(costs)


@pytest.mark.parametrize("shapes", list(product(SHAPES, repeat=3)))
def test_a_faster_link_and_less_memory_only_add_groups(shapes: Sequence[tuple[int, int]]) -> None:
    groups = groups_of(shapes)
    table = {
        (link, limit): {each.name for each in choose(groups, judge_of(groups, link), limit)}
        for link, limit in product(LINKS, LIMITS)
    }
    for limit in LIMITS:
        for slow, fast in pairwise(LINKS):
            assert table[slow, limit] <= table[fast, limit]
    for link in LINKS:
        for tight, wide in pairwise(LIMITS):
            assert table[link, tight] >= table[link, wide]


def test_the_choice_keeps_the_plans_order_and_prefers_square_matrices() -> None:
    groups = groups_of([(16, 16), (64, 64), (16, 256)])
    names = [each.name for each in choose(groups, judge_of(groups, 1e12), 0.0)]
    assert names == ["g0", "g1", "g2"]
    assert [each.name for each in choose(groups, judge_of(groups, 1e12), 4.0 * (256 + 4096))] == ["g1"]


def test_nothing_leaves_where_nothing_pays() -> None:
    groups = groups_of([(16, 16)] * 3)
    assert choose(groups, judge_of(groups, 1.0), 1e9) == ()


def test_where_nothing_fits_the_least_memory_is_taken() -> None:
    groups = groups_of([(16, 16)] * 3)
    judge = judge_of(groups, 1.0)

    def larger(chosen: tuple[Group, ...]) -> Judgement:
        return Judgement(judge(chosen).seconds, judge(chosen).memory + 1e6)

    assert choose(groups, larger, 1e5) == groups
