"""Which updates may be applied when, and which micro-batches a position contains."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hetrain.train.data_position import Position
from hetrain.train.staleness import Entry, StalenessGate


@given(
    bound=st.integers(0, 8),
    replicas=st.integers(1, 6),
    total=st.integers(0, 40),
    data=st.data(),
)
def test_no_update_is_too_stale_and_none_is_lost(
    bound: int, replicas: int, total: int, data: st.DataObject
) -> None:
    """Whatever order micro-batches finish in."""
    schedule: StalenessGate[int] = StalenessGate(bound)
    flying: dict[int, Entry[int]] = {}
    applied: list[int] = []
    snapshots: list[int] = []
    while True:
        while (index := schedule.take()) is not None:
            assert len(applied) - snapshots[index] <= bound
            applied.append(index)
        while len(snapshots) < total and len(flying) < replicas and schedule.can_start:
            flying[len(snapshots)] = schedule.start()
            snapshots.append(len(applied))
        if not flying:
            break
        landing = data.draw(st.sets(st.sampled_from(sorted(flying)), min_size=1))
        for index in landing:
            schedule.finish(flying.pop(index), index)
    assert sorted(applied) == list(range(total))
    if bound == 0:
        assert applied == list(range(total))


@given(order=st.permutations(range(12)))
def test_a_wide_bound_makes_nothing_wait(order: list[int]) -> None:
    schedule: StalenessGate[int] = StalenessGate(11)
    flying = [schedule.start() for _ in order]
    for index in order:
        schedule.finish(flying[index], index)
        assert schedule.take() == index
        assert schedule.take() is None


@given(order=st.permutations(range(12)), stop=st.integers(0, 12))
def test_a_position_knows_exactly_what_was_applied(order: list[int], stop: int) -> None:
    position = Position()
    for index in order[:stop]:
        position = position.after([index])
    assert {index for index in range(12) if index in position} == set(order[:stop])
    assert position.low not in position.beyond
    assert all(index > position.low for index in position.beyond)
