"""Activations kept as float16 for the backward pass: gradients stay what they were, memory halves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from hetrain.config import LoraConfig
from hetrain.nn.lora import SeededDropout
from hetrain.nn.memory import recompute
from hetrain.nn.memory import saved_tensors as saved_module
from hetrain.nn.memory.recompute import RecomputedBlocks
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
CHECKPOINT_OPTIONS = {"use_reentrant", "preserve_rng_state", "context_fn"}


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
    packed = [saver.pack(tensor) for tensor in tensors]
    return list(packed), [saver.unpack(each) for each in packed]


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


def test_views_are_stored_by_their_values() -> None:
    x = torch.randn(WIDTH, WIDTH)
    tensors = [x, x.t(), x.view(-1), x[:, 1:], x[:, ::2]]
    _, restored = saved(tensors, [])
    for tensor, back in zip(tensors, restored, strict=True):
        assert torch.equal(back, tensor.half().float())


class Mlp(torch.nn.Module):
    """A gated MLP over a norm, with dropout; its products are remote ones, counted."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weights = torch.nn.ParameterList(
            torch.randn(WIDTH, WIDTH, generator=generator) / 16 for _ in range(3)
        )
        self.scale = torch.rand(WIDTH, generator=generator)
        self.blocks: RecomputedBlocks | None = None
        self.in_place, self.evaluated = in_place, 0
        self.dropout = SeededDropout(0.3)

    def multiply(self, x: torch.Tensor, index: int) -> torch.Tensor:
        if self.blocks is None:
            return x @ self.weights[index]
        return CountedProduct.apply(x, self.weights[index], self, str(index))  # type: ignore[no-any-return]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.in_place:
            x += 1.0
        norm = self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        gate, up = self.multiply(norm, 0), self.multiply(self.dropout(norm), 1)
        return x + self.multiply(torch.nn.functional.silu(gate) * up, 2)


class CountedProduct(torch.autograd.Function):
    """x·W, evaluated through `RecomputedBlocks.product`."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, mlp: Mlp, name: str) -> torch.Tensor:  # type: ignore[no-untyped-def]
        def evaluate() -> torch.Tensor:
            mlp.evaluated += 1
            return x @ weight

        assert mlp.blocks is not None
        ctx.save_for_backward(x, weight)
        return mlp.blocks.product(name, evaluate)

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        return dy @ weight.t(), x.t() @ dy, None, None


def mlp_gradients(mlp: Mlp, x: torch.Tensor, saver: HalfSaver | None) -> list[torch.Tensor]:
    generator = mlp.dropout.generator = torch.Generator().manual_seed(4)

    @contextmanager
    def restored(state: torch.Tensor) -> Iterator[None]:
        generator.set_state(state)
        yield

    inputs = x.clone().requires_grad_()
    if saver is None:
        loss = mlp(inputs * 1.0).square().mean()
    else:
        mlp.blocks = RecomputedBlocks([mlp], saver, lambda: restored(generator.get_state()))
        with saver.saving():
            output = mlp(inputs * 1.0)
        generator.manual_seed(99)  # nothing may depend on what the generator has done since
        loss = output.square().mean()
    return list(torch.autograd.grad(loss, [inputs, *mlp.weights]))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_block_keeps_its_input_and_its_products_alone(in_place: bool) -> None:
    """Not the norm, dropout's, SiLU and the product of both branches; and evaluates no product twice."""
    x = torch.randn(128, WIDTH, generator=torch.Generator().manual_seed(3))
    expected = mlp_gradients(Mlp(in_place), x, None)
    mlp = Mlp(in_place)
    saver = HalfSaver(mlp.parameters())
    found = mlp_gradients(mlp, x, saver)
    assert saver.stored_values == 4 * x.numel()
    assert mlp.evaluated == 3
    for half, full in zip(found, expected, strict=True):
        assert float((half - full).norm() / full.norm()) < 2e-3


def test_a_product_is_never_evaluated_again() -> None:
    mlp, x = Mlp(), torch.randn(128, WIDTH)
    saver = HalfSaver(mlp.parameters())
    mlp.blocks = RecomputedBlocks([mlp], saver, nullcontext)
    with saver.saving():
        loss = mlp(x).square().mean()
    loss.backward(retain_graph=True)
    with pytest.raises(AttributeError):  # the context of the block's second computation is used up
        loss.backward()
    assert mlp.evaluated == 3


def test_without_gradients_nothing_is_kept() -> None:
    mlp, x = Mlp(), torch.randn(128, WIDTH)
    saver = HalfSaver(mlp.parameters())
    mlp.blocks = RecomputedBlocks([mlp], saver, nullcontext)
    with saver.saving(), torch.no_grad():
        mlp(x)
    frozen = Mlp().requires_grad_(False)
    frozen.blocks = RecomputedBlocks([frozen], saver, nullcontext)
    with saver.saving():
        frozen(x)
    assert saver.stored_values == 0


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


def test_blocks_are_computed_again_with_the_dropout_that_they_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(FAMILIES["llama"], tmp_path)
    harness = SplitHarness(tmp_path, LoraConfig(r=4, alpha=8, dropout=0.3))
    again = run_step(harness.replica(), packed(rows()), harness.snapshot(), seed=3)
    assert len(harness.requests) == len(set(harness.requests))

    def never_again(forward: Callable[..., object], *inputs: object, **options: object) -> object:
        return forward(*inputs, **{k: v for k, v in options.items() if k not in CHECKPOINT_OPTIONS})

    monkeypatch.setattr(recompute, "checkpoint", never_again)
    once = run_step(harness.replica(), packed(rows()), harness.snapshot(), seed=3)
    assert again.summed_loss == once.summed_loss
    for name, gradient in once.gradients.items():
        assert torch.allclose(again.gradients[name], gradient, rtol=1e-4, atol=1e-6), name


def test_memory_that_was_given_back_is_not_taken_for_what_lay_there() -> None:
    """Temporaries come and go at the same address within one forward pass."""
    saver = HalfSaver([])
    packed = [saver.pack(torch.full((WIDTH, WIDTH), float(value))) for value in range(20)]
    assert [float(saver.unpack(each)[0, 0]) for each in packed] == [float(value) for value in range(20)]


def test_parameters_small_tensors_and_other_types_stay_as_they_are() -> None:
    weight = torch.nn.Parameter(torch.randn(WIDTH, WIDTH))
    tensors = [weight, weight.t(), torch.randn(10), torch.zeros(WIDTH, WIDTH, dtype=torch.int64)]
    packed, _ = saved(tensors, [weight])
    assert all(one is other for one, other in zip(packed, tensors, strict=True))
