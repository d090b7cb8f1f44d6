"""Which micro-batches make an update, at which adapter they are computed, and what is skipped."""

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
from hetrain.train.loop import AppliedUpdate, train
from hetrain.train.staleness import Entry, UpdateQueue
from hetrain.train.step import run_step
from hetrain.train.updater import Updater
from tests.harness.split_model import FAMILIES, SplitHarness, packed, rows, save_model

STEPS = 8
LOCK_STEP = TrainingConfig(
    learning_rate=0.1, weight_decay=0.1, max_grad_norm=0.5, batch_tokens=8, micro_batch_tokens=4
)
SINGLE = replace(LOCK_STEP, batch_tokens=4)
OVERLAPPING = replace(LOCK_STEP, in_flight=3, max_staleness=2)


@given(
    bound=st.integers(0, 4),
    warm_up=st.integers(0, 5),
    width=st.integers(1, 4),
    replicas=st.integers(1, 6),
    total=st.integers(0, 40),
    data=st.data(),
)
def test_updates_are_made_in_order_within_the_bound_and_none_is_lost(
    bound: int, warm_up: int, width: int, replicas: int, total: int, data: st.DataObject
) -> None:
    """Whatever order micro-batches finish in."""
    config = replace(LOCK_STEP, max_staleness=bound, warmup_steps=warm_up)
    queue: UpdateQueue[int] = UpdateQueue(0, width, config.staleness_bound)
    flying: dict[int, Entry[int]] = {}
    versions: list[int] = []
    made: list[tuple[int, ...]] = []
    while len(versions) < total or not queue.is_empty:
        while results := queue.take(is_drained=len(versions) == total):
            for index in results:  # what was promised at its start
                assert len(made) - versions[index] <= config.staleness_bound(len(made))
            made.append(results)
        while len(versions) < total and len(flying) < replicas and queue.can_start:
            entry = queue.start()
            assert len(made) + entry.staleness == len(versions) // width
            flying[len(versions)] = entry
            versions.append(len(made))
        if flying:
            for index in data.draw(st.sets(st.sampled_from(sorted(flying)), min_size=1)):
                flying.pop(index).result = index
    assert [index for results in made for index in results] == list(range(total))
    assert all(len(results) == width for results in made[:-1])
    if bound == 0:
        assert versions == [index // width for index in range(total)]


@given(width=st.integers(1, 4), bound=st.integers(0, 4), order=st.permutations(range(20)))
def test_as_much_overlaps_as_the_bound_allows(width: int, bound: int, order: list[int]) -> None:
    queue: UpdateQueue[int] = UpdateQueue(0, width, lambda update: bound)
    entries = []
    while queue.can_start:
        entries.append(queue.start())
    assert [entry.staleness for entry in entries] == [index // width for index in range(width * (bound + 1))]
    for index in (each for each in order if each < len(entries)):
        entries[index].result = index
    taken = [queue.take(is_drained=False) for _ in range(bound + 2)]
    assert taken == [tuple(range(width * update, width * (update + 1))) for update in range(bound + 1)] + [()]


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
    places = torch.arange(4)
    return MicroBatch(index, tokens, places, (places,), torch.tensor([1, 1, 1, -100]), (index,))


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
        replicas = [FakeReplica(spoiled) for _ in range(config.replicas)]
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
@pytest.mark.parametrize("config", [LOCK_STEP, SINGLE], ids=["two micro-batches", "one"])
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


@given(data=st.data(), width=st.integers(1, 2), limit=st.integers(1, 4))
def test_a_job_ends_after_so_many_skipped_updates_in_a_row(
    data: st.DataObject, width: int, limit: int
) -> None:
    config = replace(LOCK_STEP, batch_tokens=4 * width, max_skipped_updates=limit)
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


@given(spoiled=st.dictionaries(st.integers(0, 2 * STEPS - 1), st.sampled_from(sorted(SPOILED))))
def test_what_is_skipped_counts_as_an_update_for_staleness(spoiled: dict[int, str]) -> None:
    course = Course(replace(OVERLAPPING, max_skipped_updates=STEPS + 1), spoiled)
    indices = [[result.batch.index for result in each.results] for each in course.applied]
    assert indices == [[2 * step, 2 * step + 1] for step in range(STEPS)]
    assert course.skipped == sorted({index // 2 + 1 for index in spoiled})
    assert all(0 <= result.staleness <= 2 for each in course.applied for result in each.results)


class Delayed:
    """An updater's rules by hand: torch's AdamW, and gradients at the weights predicted for their update."""

    def __init__(self, config: TrainingConfig) -> None:
        self.parameters = fresh_parameters()
        self._config = config
        self._optimizer = torch.optim.AdamW(self.parameters.values(), weight_decay=0.1)
        self._made = 0

    def rate(self, update: int) -> float:
        return 0.1 * (STEPS - update) / STEPS

    def expected(self, staleness: int) -> dict[str, torch.Tensor]:
        """θ − Σ η·(m̂ / (√v̂ + ε) + λ·θ), in float64."""
        values = {}
        for name, parameter in self.parameters.items():
            value, state = parameter.detach().double(), self._optimizer.state[parameter]
            if state and self._config.staleness_correction == "prediction":
                steps, rates = float(state["step"]), [self.rate(self._made + k) for k in range(staleness)]
                mean = state["exp_avg"].double() / (1 - 0.9**steps)
                spread = (state["exp_avg_sq"].double() / (1 - 0.999**steps)).sqrt() + 1e-8
                value = value * (1 - 0.1 * sum(rates)) - sum(rates) * mean / spread
            values[name] = value.float()
        return values

    def apply(self, gradients: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name].clone()
        nn.utils.clip_grad_norm_(self.parameters.values(), 0.5)
        self._optimizer.param_groups[0]["lr"] = self.rate(self._made)
        self._optimizer.step()
        self._made += 1


@pytest.mark.parametrize("correction", ["prediction", "none"])
def test_a_stale_micro_batch_is_computed_at_the_weights_expected_by_its_update(correction: str) -> None:
    config = replace(OVERLAPPING, batch_tokens=4, staleness_correction=correction)
    updater, byhand = Updater(parameters := fresh_parameters(), config, STEPS), Delayed(config)
    for step in range(STEPS):
        staleness = step % 3
        snapshot, expected = updater.snapshot(staleness), byhand.expected(staleness)
        gradients = {}
        for name, value in snapshot.values.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
            gradients[name] = 2 * (value - step - 1)
        assert snapshot.staleness == staleness
        updater.apply([gradients], 1)
        byhand.apply(gradients)
    for name, value in parameters.items():
        torch.testing.assert_close(value, byhand.parameters[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "config", [replace(LOCK_STEP, batch_tokens=20), replace(OVERLAPPING, in_flight=2)], ids=["5", "2+2+2"]
)
def test_an_update_that_has_begun_is_completed_and_none_begins_after_a_stop(config: TrainingConfig) -> None:
    """Also with fewer replicas than micro-batches, and whether or not updates overlap."""
    updater, width = Updater(fresh_parameters(), config, STEPS), config.batches_per_update
    replicas = [FakeReplica({}) for _ in range(config.replicas)]
    made: list[AppliedUpdate] = []
    batches = map(micro_batch, range(100))
    stop = lambda: len(made) >= 2  # noqa: E731
    for each in train(updater, replicas, batches, config, lambda: None, stop):  # type: ignore[arg-type]
        made.append(each)
    assert 2 <= len(made) <= 2 + config.max_staleness
    assert [len(each.results) for each in made] == [width] * len(made)


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
