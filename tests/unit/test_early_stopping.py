"""When to evaluate, which evaluation is the best, and when training ends: as transformers counts."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import EarlyStoppingCallback

from hetrain.config import TrainingConfig
from hetrain.data.tokenization import Row
from hetrain.data.updates import Position, count_updates, draw, epoch_ends
from hetrain.train.early_stopping import EvaluationState
from hetrain.train.validation import is_due

LOSSES = st.floats(0, 10) | st.just(math.nan)


@given(
    losses=st.lists(LOSSES, max_size=12), patience=st.integers(1, 4), threshold=st.sampled_from([0.0, 0.5])
)
def test_training_ends_as_with_transformers(losses: list[float], patience: int, threshold: float) -> None:
    theirs = EarlyStoppingCallback(patience, threshold)
    arguments = SimpleNamespace(greater_is_better=False, metric_for_best_model="eval_loss")
    trainer, control = SimpleNamespace(best_metric=None), SimpleNamespace(should_training_stop=False)
    state = EvaluationState()
    for step, loss in enumerate(losses, 1):
        if trainer.best_metric is None and math.isnan(loss):
            return  # the callback takes a first loss that is not finite for the best one
        theirs.on_evaluate(arguments, trainer, control, {"eval_loss": loss})
        if trainer.best_metric is None or loss < trainer.best_metric:  # as its trainer does afterwards
            trainer.best_metric, trainer.best_global_step = loss, step
        state = state.after(step, loss, threshold)
        assert state.ends_training(patience) == control.should_training_stop
        assert (state.best_loss, state.best_step) == (trainer.best_metric, trainer.best_global_step)
        assert not state.ends_training(None)
        assert EvaluationState.model_validate_json(state.model_dump_json()) == state
        if control.should_training_stop:
            return


def test_when_rows_are_evaluated() -> None:
    def due(**how: Any) -> list[int]:
        return [step for step in range(1, 13) if is_due(step, 12, TrainingConfig(**how), frozenset({5, 10}))]

    assert due() == []
    assert due(eval_strategy="steps", eval_steps=5) == [5, 10, 12]
    assert due(eval_strategy="steps") == [12]
    assert due(eval_strategy="epoch") == [5, 10, 12]


ROWS = [Row(tokens=(1,) * n, supervised=(False,) + (True,) * (n - 1), line=n) for n in range(3, 20)]


@pytest.mark.parametrize(
    "size", [{"batch_tokens": 60}, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}]
)
@given(first=st.floats(0.1, 3), more=st.floats(0.1, 3))
def test_a_run_that_is_extended_learns_every_row_once_an_epoch(
    size: dict[str, int], first: float, more: float
) -> None:
    """Also where the last update of the shorter run has fewer micro-batches than others."""

    def config(n_epochs: float) -> TrainingConfig:
        return TrainingConfig(micro_batch_tokens=20, max_length=20, num_train_epochs=n_epochs, **size)

    total = count_updates(ROWS, config(first))
    drawn = list(draw(ROWS, config(first), total))
    position = Position(total, len(drawn))
    longer = count_updates(ROWS, config(first + more), position)
    batches = drawn + list(draw(ROWS, config(first + more), longer, position))
    assert [batch.index for batch in batches] == list(range(len(batches)))
    rows = [row for batch in batches for row in batch.rows]
    for start in range(0, len(rows) - len(ROWS) + 1, len(ROWS)):
        assert sorted(rows[start : start + len(ROWS)]) == list(range(len(ROWS)))
    assert len(rows) >= len(ROWS) * (first + more) - 1e-6
    if at_once := size.get("per_device_train_batch_size"):
        assert {len(batch.rows) for batch in batches} <= {at_once, len(ROWS) % at_once}


@given(n_epochs=st.integers(1, 4), width=st.integers(1, 10))
def test_an_epoch_ends_with_the_update_that_has_its_last_micro_batch(n_epochs: int, width: int) -> None:
    config = TrainingConfig(
        micro_batch_tokens=20, max_length=20, gradient_accumulation_steps=width, num_train_epochs=n_epochs
    )
    total = count_updates(ROWS, config)
    seen, expected = 0, set()
    for batch in draw(ROWS, config, total):
        seen += len(batch.rows)
        if seen % len(ROWS) == 0:
            expected.add(batch.index // width + 1)
    assert epoch_ends(ROWS, config, total) == expected
    for made in range(1, total):
        later = epoch_ends(ROWS, config, total, Position(made, made * width))
        assert later == {update for update in expected if update >= made}
