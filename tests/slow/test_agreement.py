"""Encrypted and plain training agree, on the real model over the real queue."""

from __future__ import annotations

import pytest

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

TOKENS, STEPS = 2048, 2


@pytest.fixture(scope="module")
def curves() -> dict[str, Curve]:
    """Two steps over the same 2048 tokens, with stock peft in fp32 and with both engines.

    `rlwe` makes the first step without hints and the second one with.
    """
    base = open_base("smollm2-135m")
    batches = draw(base, "text", TOKENS, 1) * STEPS
    assert all(batch.n_tokens == TOKENS for batch in batches)
    values = initial_values(base)
    return {
        "plain": plain_curve(base, values, batches),
        "clear": engine_curve(base, "clear", values, batches),
        "rlwe": engine_curve(base, "rlwe", values, batches, hints=True),
    }


def test_the_first_loss_is_that_of_plain_peft(curves: dict[str, Curve]) -> None:
    plain, encrypted = curves["plain"].losses[0], curves["rlwe"].losses[0]
    assert abs(encrypted - plain) / plain < 0.005


def test_encryption_leaves_the_gradients_alone(curves: dict[str, Curve]) -> None:
    assert cosine(curves["rlwe"].first_gradients, curves["clear"].first_gradients) > 0.99
    assert cosine(curves["rlwe"].first_gradients, curves["plain"].first_gradients) > 0.98


def test_the_curves_stay_together(curves: dict[str, Curve]) -> None:
    assert curves["plain"].losses[1] < curves["plain"].losses[0]
    assert largest_difference(curves["rlwe"], curves["plain"]) < 0.01
    assert largest_difference(curves["clear"], curves["plain"]) < 0.01
