"""Activations kept as float16 for the backward pass: gradients stay what they were, memory halves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hetrain.nn.memory import saved_tensors as saved_module
from hetrain.nn.memory.saved_tensors import HalfSaver
from hetrain.train.step import run_step
from tests.harness.split_model import (
    FAMILIES,
    SplitHarness,
    adapter_parameters,
    packed,
    rows,
    save_model,
    stock_loss,
)

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


class Save(torch.autograd.Function):
    """Has autograd save tensors, as any operation does that needs them for its gradient."""

    @staticmethod
    def forward(ctx: Any, start: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        return start.clone()


def save(*tensors: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Saves tensors, and returns what gives them back."""
    node = Save.apply(torch.zeros(1, requires_grad=True), *(tensor.detach() for tensor in tensors)).grad_fn
    return lambda: node.saved_tensors


def saved(tensors: list[torch.Tensor], kept: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """What a saver gives back for each tensor."""
    with HalfSaver(kept).saving():
        restore = save(*tensors)
    return restore()


@pytest.mark.parametrize("columns", [slice(None), slice(1, None)], ids=["all", "some"])
def test_outliers_and_what_is_not_finite_survive(columns: slice) -> None:
    x = torch.randn(WIDTH, WIDTH)[:, columns]
    x[3, 5] = 3e7
    (back,) = saved([x], [])
    assert float(back[3, 5]) == pytest.approx(3e7, rel=1e-3)
    assert float((back - x).abs().max()) < 3e7 * 2**-11
    x[3, 5], x[4, 6] = float("nan"), float("inf")
    (back,) = saved([x], [])
    assert back.isnan().sum() == 1
    assert back.isinf().sum() == 1


def test_a_tensor_that_is_saved_twice_is_stored_once() -> None:
    x, saver = torch.randn(WIDTH, WIDTH), HalfSaver([])
    tensors = [x, x, x.t(), x.view(-1), x[:, 1:], x[:, 1:]]
    with saver.saving():
        restore = save(*tensors)
    assert saver.stored_values == x.numel() + x[:, 1:].numel()
    for tensor, back in zip(tensors, restore(), strict=True):
        assert torch.equal(back, tensor.half().float())


def test_what_follows_from_what_is_stored_is_computed_again() -> None:
    """A gated MLP over a norm keeps the norm's input, gate and up, not the norm, SiLU and the product."""
    generator = torch.Generator().manual_seed(3)
    weight = [torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / 16) for _ in range(3)]
    scale, x = torch.rand(WIDTH, generator=generator), torch.randn(128, WIDTH, generator=generator)

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        norm = scale * (inputs * torch.rsqrt(inputs.pow(2).mean(-1, keepdim=True) + 1e-6))
        gate, up = norm @ weight[0], norm @ weight[1]
        return ((torch.nn.functional.silu(gate) * up) @ weight[2]).square().mean()

    expected = torch.autograd.grad(forward(inputs := x.clone().requires_grad_()), [inputs, *weight])
    saver = HalfSaver(weight)
    with saver.saving():
        loss = forward(inputs)
    assert saver.stored_values == 4 * x.numel()  # and what the square is of
    for half, full in zip(torch.autograd.grad(loss, [inputs, *weight]), expected, strict=True):
        assert float((half - full).norm() / full.norm()) < 2e-3


def test_what_was_written_to_since_is_not_computed_again() -> None:
    x, saver = torch.randn(WIDTH, WIDTH, requires_grad=True), HalfSaver([])
    with saver.saving():
        kept = x.detach() * 1.0
        save(kept)
        product = torch.mul(kept, 2.0)
        kept.add_(1.0)
        before = save(product)
        other = torch.mul(kept, 2.0)
        kept.add_(1.0)
        after = save(other)
        product.add_(1.0)
        changed = save(product)
    assert torch.allclose(before()[0], 2 * x, atol=0.02)
    assert torch.allclose(after()[0], 2 * x + 2, atol=0.02)
    assert torch.allclose(changed()[0], 2 * x + 1, atol=0.02)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", FAMILIES)
def test_every_architecture_keeps_its_gradients(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 weights, and tensors that all count as large: kept in half precision or computed again."""
    monkeypatch.setattr(saved_module, "SMALLEST", 64)
    save_model(FAMILIES[name], tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    harness = SplitHarness(tmp_path)
    result = run_step(harness.replica(), packed(rows()), harness.snapshot(), seed=0)
    reference = harness.stock_peft()
    losses = [stock_loss(reference, row) for row in rows()]
    sum(losses).backward()
    assert result.summed_loss == pytest.approx(sum(loss.item() for loss in losses), rel=1e-4)
    expected = {name: p.grad for name, p in adapter_parameters(reference).items()}
    largest = max(gradient.norm() for gradient in expected.values())
    for parameter, gradient in expected.items():
        error = (result.gradients[parameter] - gradient).norm()
        assert error <= 2e-2 * gradient.norm() + 1e-4 * largest, parameter


def test_memory_that_was_given_back_is_not_taken_for_what_lay_there() -> None:
    """Temporaries come and go at the same address within one forward pass."""
    saver = HalfSaver([])
    with saver.saving():
        restored = [save(torch.full((WIDTH, WIDTH), float(value))) for value in range(20)]
    assert [float(each()[0][0, 0]) for each in restored] == [float(value) for value in range(20)]


def test_parameters_small_tensors_and_other_types_stay_as_they_are() -> None:
    weight = torch.nn.Parameter(torch.randn(WIDTH, WIDTH))
    tensors = [weight, weight.t(), torch.randn(10), torch.zeros(WIDTH, WIDTH, dtype=torch.int64)]
    for back, tensor in zip(saved(tensors, [weight]), tensors, strict=True):
        assert (back.data_ptr(), back.stride(), back.dtype) == (
            tensor.data_ptr(),
            tensor.stride(),
            tensor.dtype,
        )
