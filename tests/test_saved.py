"""Activations kept as float16 for the backward pass: gradients stay what they were, memory halves."""

from __future__ import annotations

import pytest
import torch

from hetrain.nn.saved import HalfSaver

WIDTH = 256


def gradients(saver: HalfSaver | None, x: torch.Tensor, weight: torch.nn.Parameter) -> list[torch.Tensor]:
    """Of a small network that saves one tensor twice, views, an outlier and its own parameter."""
    weight.grad = None
    inputs = x.clone().requires_grad_()

    def forward() -> torch.Tensor:
        hidden = torch.nn.functional.silu(inputs @ weight)
        halves = (hidden * hidden.sigmoid()).view(-1, WIDTH // 2)
        return (halves.square() * halves.sigmoid()).mean()

    if saver is None:
        loss = forward()
    else:
        with saver.saving():
            loss = forward()
    loss.backward()
    assert inputs.grad is not None
    assert weight.grad is not None
    return [inputs.grad, weight.grad]


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_gradients_keep_three_digits(size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / 16)
    saver = HalfSaver([weight])
    for _ in range(3):  # one after the other in the same memory
        x = size * torch.randn(128, WIDTH, generator=generator)
        for half, full in zip(gradients(saver, x, weight), gradients(None, x, weight), strict=True):
            assert float((half - full).norm() / full.norm()) < 2e-3


def saved(tensors: list[torch.Tensor], kept: list[torch.Tensor]) -> tuple[list[object], list[torch.Tensor]]:
    """What a saver packs each tensor into, and what it gives back."""
    saver = HalfSaver(kept)
    with saver.saving():
        packed = [saver._pack(tensor) for tensor in tensors]
    return packed, [saver._unpack(each) for each in packed]  # type: ignore[arg-type]


def test_outliers_and_what_is_not_finite_survive() -> None:
    x = torch.randn(WIDTH, WIDTH)
    x[3, 5] = 3e7
    (_,), (back,) = saved([x], [])
    assert float(back[3, 5]) == pytest.approx(3e7, rel=1e-3)
    assert float((back - x).abs().max()) < 3e7 * 2**-11
    x[3, 5], x[4, 6] = float("nan"), float("inf")
    (_,), (back,) = saved([x], [])
    assert back.isnan().sum() == 1
    assert back.isinf().sum() == 1


def test_a_tensor_that_is_saved_twice_is_stored_once() -> None:
    x = torch.randn(WIDTH, WIDTH)
    packed, back = saved([x, x, x.t(), x.view(-1)], [])
    assert packed[0] is packed[1]
    assert packed[0] is not packed[2]
    assert torch.equal(back[2], back[0].t())
    assert torch.equal(back[3].view(WIDTH, WIDTH), back[0])


def test_memory_that_was_given_back_is_not_taken_for_what_lay_there() -> None:
    """Temporaries come and go at the same address within one forward pass."""
    saver = HalfSaver([])
    with saver.saving():
        packed = [saver._pack(torch.full((WIDTH, WIDTH), float(value))) for value in range(20)]
    assert [float(saver._unpack(each)[0, 0]) for each in packed] == [float(value) for value in range(20)]


def test_parameters_small_tensors_and_other_types_stay_as_they_are() -> None:
    weight = torch.nn.Parameter(torch.randn(WIDTH, WIDTH))
    tensors = [weight, weight.t(), torch.randn(10), torch.zeros(WIDTH, WIDTH, dtype=torch.int64)]
    packed, _ = saved(tensors, [weight])
    assert all(one is other for one, other in zip(packed, tensors, strict=True))
