"""Which updates may be applied when, which are skipped, and which micro-batches a position contains."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hetrain.config import TrainingConfig
from hetrain.data.packing import MicroBatch
from hetrain.nn.remote import ProductStats
from hetrain.public.errors import NotFinite
from hetrain.train.data_position import Position
from hetrain.train.loop import AppliedUpdate, train
from hetrain.train.staleness import Entry, StalenessGate
from hetrain.train.step import run_step
from hetrain.train.updater import Updater
from tests.harness.split_model import FAMILIES, SplitHarness, packed, rows, save_model

STEPS = 8
SYNC = TrainingConfig(learning_rate=0.1, weight_decay=0.1, max_grad_norm=0.5, in_flight=2, sync=True)
IN_ORDER = replace(SYNC, sync=False, in_flight=1)
FREE = replace(SYNC, sync=False, in_flight=3)


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


class _NotFiniteBackward(torch.autograd.Function):
    """x, whose gradient cannot be sealed."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        raise NotFinite("a gradient")


def _refuse(loss: torch.Tensor) -> torch.Tensor:
    raise NotFinite("an activation")


SPOILED: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "activation": _refuse,
    "sealed gradient": _NotFiniteBackward.apply,
    "loss": lambda loss: loss + math.inf,
    "gradient": lambda loss: loss + (0 * loss).sqrt(),
}


def micro_batch(index: int) -> MicroBatch:
    tokens = torch.full((4,), index)
    return MicroBatch(index, tokens, torch.arange(4), torch.tensor([1, 1, 1, -100]), (4,))


def loss_of(parameters: Mapping[str, torch.Tensor], index: int) -> torch.Tensor:
    return sum(((value - index - 1) ** 2).sum() for value in parameters.values())  # type: ignore[return-value]


def fresh_parameters() -> dict[str, nn.Parameter]:
    return {"a": nn.Parameter(torch.ones(3)), "b": nn.Parameter(torch.zeros(2, 2))}


class FakeReplica:
    """A replica of a model that needs no products, spoiled in some micro-batches."""

    def __init__(self, spoiled: Mapping[int, str]) -> None:
        self.stats = ProductStats()
        self._spoiled = spoiled
        self._parameters = fresh_parameters()

    def load(self, snapshot: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.data.copy_(snapshot[name])

    def seed_dropout(self, seed: int | None) -> None:
        """There is none."""

    def summed_loss(self, tokens: torch.Tensor, *others: object) -> torch.Tensor:
        index = int(tokens[0])
        loss = loss_of(self._parameters, index)
        return SPOILED[self._spoiled[index]](loss) if index in self._spoiled else loss

    def take_gradients(self) -> dict[str, torch.Tensor]:
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        for parameter in self._parameters.values():
            parameter.grad = None
        return gradients


class Course:
    """A training of `STEPS` updates, as far as it gets."""

    def __init__(self, config: TrainingConfig, spoiled: Mapping[int, str]) -> None:
        self.parameters = fresh_parameters()
        self.updater = Updater(self.parameters, config, STEPS)
        self.aborted = self.error = None
        self.applied: list[AppliedUpdate] = []
        replicas = [FakeReplica(spoiled) for _ in range(config.in_flight)]
        batches = map(micro_batch, range(STEPS * config.batches_per_update))
        try:
            for each in train(self.updater, replicas, batches, config, self._abort):  # type: ignore[arg-type]
                self.applied.append(each)
        except NotFinite as error:
            self.error = error

    def _abort(self) -> None:
        self.aborted = True

    @property
    def skipped(self) -> list[int]:
        return [each.update.step for each in self.applied if each.update.is_skipped]


def trained_by_hand(skipped: set[int], batches_per_update: int) -> dict[str, nn.Parameter]:
    """torch's AdamW, which sees neither the skipped updates nor the schedule."""
    parameters = fresh_parameters()
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=0.1)
    for step in set(range(STEPS)) - skipped:
        optimizer.zero_grad()
        for batch in range(step * batches_per_update, (step + 1) * batches_per_update):
            loss_of(parameters, batch).backward()
        for parameter in parameters.values():
            parameter.grad /= 3 * batches_per_update  # type: ignore[operator]
        nn.utils.clip_grad_norm_(parameters.values(), 0.5)
        optimizer.param_groups[0]["lr"] = 0.1 * (STEPS - step) / STEPS
        optimizer.step()
    return parameters


@pytest.mark.parametrize("kind", SPOILED)
@pytest.mark.parametrize("config", [SYNC, IN_ORDER], ids=["sync", "asynchronous"])
def test_a_skipped_update_changes_nothing_and_takes_its_place(
    config: TrainingConfig, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also the very first one, before the optimizer has any moments."""
    width = config.batches_per_update
    with caplog.at_level(logging.WARNING):
        course = Course(config, {0: kind, 3 * width: kind, 6 * width - 1: kind})
    assert (course.error, course.aborted, course.skipped) == (None, None, [1, 4, 6])
    assert [each.update.step for each in course.applied] == list(range(1, STEPS + 1))
    warnings = [record.getMessage().split(" is skipped")[0] for record in caplog.records]
    assert warnings == ["update 1", "update 4", "update 6"]
    expected = trained_by_hand({0, 3, 5}, width)
    for name, value in course.parameters.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)
    assert course.updater.optimizer_state()["a/step"] == STEPS - 3


@given(data=st.data(), is_sync=st.booleans(), limit=st.integers(1, 4))
def test_a_job_ends_after_so_many_skipped_updates_in_a_row(
    data: st.DataObject, is_sync: bool, limit: int
) -> None:
    config = replace(SYNC if is_sync else IN_ORDER, max_skipped_updates=limit)
    spoiled = data.draw(st.sets(st.integers(0, STEPS - 1)))
    ends = [
        end for end in range(limit, STEPS + 1) if spoiled.issuperset(range(end - limit, end))
    ]  # updates after which as many in a row were spoiled
    course = Course(config, dict.fromkeys((step * config.batches_per_update for step in spoiled), "loss"))
    made = ends[0] if ends else STEPS
    assert [each.update.step for each in course.applied] == list(range(1, made + 1))
    assert course.skipped == [step + 1 for step in sorted(spoiled) if step < made]
    assert (course.error is not None, course.aborted) == ((True, True) if ends else (False, None))
    # It can go on from there, even if no update was made at all.
    updater = Updater(fresh_parameters(), config, STEPS)
    values, moments = course.updater.snapshot().values, course.updater.optimizer_state()
    updater.restore(values, moments, course.updater.schedule_state(), course.updater.version)
    assert updater.version == made


@given(spoiled=st.dictionaries(st.integers(0, STEPS - 1), st.sampled_from(sorted(SPOILED))))
def test_what_is_skipped_counts_as_an_update_for_staleness(spoiled: dict[int, str]) -> None:
    course = Course(replace(FREE, max_staleness=2, max_skipped_updates=STEPS + 1), spoiled)
    assert sorted(each.results[0].batch.index for each in course.applied) == list(range(STEPS))
    assert {each.results[0].batch.index for each in course.applied if each.update.is_skipped} == set(spoiled)
    assert all(0 <= each.update.step - 1 - each.results[0].version <= 2 for each in course.applied)


def _spoil_forward(module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    return inputs[0] * math.nan


def _spoil_backward(module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    return inputs[0] + (0 * inputs[0]).sqrt()


@pytest.mark.parametrize("spoil", [_spoil_forward, _spoil_backward])
def test_a_replica_forgets_a_step_whose_values_could_not_be_sealed(
    tmp_path: Path, spoil: Callable[..., torch.Tensor]
) -> None:
    save_model(FAMILIES["llama"], tmp_path)
    harness = SplitHarness(tmp_path)
    replica = harness.replica()
    expected = run_step(replica, packed(rows()), harness.snapshot(), seed=0)
    complete = len(harness.requests)
    (projection,) = [
        module for name, module in replica.model.named_modules() if name.endswith("layers.1.mlp.down_proj")
    ]
    hook = projection.register_forward_pre_hook(spoil)
    spoiled = run_step(replica, packed(rows()), harness.snapshot(), seed=0)
    hook.remove()
    assert spoiled.gradients is None
    assert math.isnan(spoiled.summed_loss) == (spoil is _spoil_forward)
    assert complete < len(harness.requests) < 2 * complete
    again = run_step(replica, packed(rows()), harness.snapshot(), seed=0)
    assert again.summed_loss == expected.summed_loss
    assert expected.gradients is not None
    assert again.gradients is not None
    assert all(torch.equal(again.gradients[name], value) for name, value in expected.gradients.items())
