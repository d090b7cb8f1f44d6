"""Encrypted and plain training agree: the same assertions for models and micro-batches of different sizes."""

from __future__ import annotations

from benchmarks.convergence import (
    Curve,
    cosine,
    draw,
    engine_curve,
    initial_values,
    largest_difference,
    plain_curve,
)
from hetrain.train.session import open_base

STEPS = 2


def train_all_ways(model: str, tokens: int) -> dict[str, Curve]:
    """Two steps over the same tokens, with stock peft in fp32 and with both engines."""
    base = open_base(model)
    batches = draw(base, "text", tokens, 1) * STEPS
    assert all(batch.n_tokens == tokens for batch in batches)
    values = initial_values(base)
    return {
        "plain": plain_curve(base, values, batches),
        "clear": engine_curve(base, "clear", values, batches),
        "rlwe": engine_curve(base, "rlwe", values, batches),
    }


class Agreement:
    """What a class of tests inherits that has a fixture `curves`, made by `train_all_ways`."""

    def test_the_first_loss_is_that_of_plain_peft(self, curves: dict[str, Curve]) -> None:
        plain, encrypted = curves["plain"].losses[0], curves["rlwe"].losses[0]
        assert abs(encrypted - plain) / plain < 0.005

    def test_encryption_leaves_the_gradients_alone(self, curves: dict[str, Curve]) -> None:
        assert cosine(curves["rlwe"].first_gradients, curves["clear"].first_gradients) > 0.99
        assert cosine(curves["rlwe"].first_gradients, curves["plain"].first_gradients) > 0.98

    def test_the_curves_stay_together(self, curves: dict[str, Curve]) -> None:
        assert curves["plain"].losses[1] < curves["plain"].losses[0]
        assert largest_difference(curves["rlwe"], curves["plain"]) < 0.01
        assert largest_difference(curves["clear"], curves["plain"]) < 0.01
