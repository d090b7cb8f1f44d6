"""Norms and gates in one pass: every instruction set against torch in float64, and models that use them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hetrain.nn import fused
from hetrain.nn.families import Activation
from hetrain.nn.fused import (
    as_in_transformers,
    fuse_layers,
    gated_gelu,
    gated_silu,
    layer_kernels,
    reference_gated_gelu,
    reference_gated_silu,
    reference_rms_norm,
    rms_norm,
)
from hetrain.nn.memory.saved_tensors import HalfSaver
from hetrain.nn.native import layers_library
from hetrain.nn.native.layers_library import NativeLayers
from hetrain.public import compiled
from hetrain.public.compiled import INSTRUCTION_SETS
from hetrain.public.errors import ParameterError, UnsupportedArchitecture, UsageError
from tests.harness.split_model import FAMILIES, SplitHarness, assert_faithful, save_model

EPSILON = 1e-6
SHAPES = [(1, 1), (1, 577), (3, 5), (4, 16), (5, 31), (2, 64), (7, 100), (0, 8)]
GATES: list[Activation] = ["silu", "gelu"]
FUSED = {"silu": gated_silu, "gelu": gated_gelu}
REFERENCE = {"silu": reference_gated_silu, "gelu": reference_gated_gelu}

BEST = NativeLayers.best()
LEVELS = INSTRUCTION_SETS[: BEST.level + 1] if BEST is not None else ()
needs_kernels = pytest.mark.skipif(BEST is None, reason="the kernels were not compiled")


@pytest.fixture(params=LEVELS)
def native(request: pytest.FixtureRequest) -> NativeLayers:
    found = NativeLayers.best(request.param)
    assert found is not None
    return found


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(NativeLayers, "best", staticmethod(lambda: None))
    layer_kernels.cache_clear()
    yield
    layer_kernels.cache_clear()


def draw(*shape: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def columns(rows: int, width: int, seed: int, size: float = 1.0) -> torch.Tensor:
    """Columns of a wider matrix, where rows are apart and begin anywhere."""
    return draw(rows, 2 * width + 3, seed=seed, size=size)[:, 2 : 2 + width]


def assert_close(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor | float) -> None:
    """Within 1e-6 of `scale`, the size of what is added up to make each value."""
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert bool(((found.double() - expected).abs() <= 1e-6 * scale).all())


# ---- Kernels ----


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e6])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_norm(native: NativeLayers, rows: int, width: int, size: float) -> None:
    x, dy, weight = columns(rows, width, 1, size), columns(rows, width, 2), draw(width, seed=3)
    wide = x.double().requires_grad_()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
    normed = wide * inverse
    expected = weight.double() * normed
    (dx,) = torch.autograd.grad(expected, wide, dy.double())
    assert_close(native.rms_norm(x, weight, EPSILON), expected, expected.abs())
    terms = (weight * dy).double().abs()
    scale = inverse * (terms + normed.abs() * (terms * normed.abs()).mean(-1, keepdim=True))
    assert_close(native.rms_norm_backward(x, weight, dy, EPSILON), dx, scale)


@pytest.mark.parametrize("size", [1e-4, 1.0, 30.0])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("activation", GATES)
def test_gate(native: NativeLayers, activation: Activation, rows: int, width: int, size: float) -> None:
    g, u, dy = columns(rows, width, 1, size), columns(rows, width, 2), columns(rows, width, 3)
    wide_g, wide_u = g.double().requires_grad_(), u.double().requires_grad_()
    expected = REFERENCE[activation](wide_g, wide_u)
    dg, du = torch.autograd.grad(expected, (wide_g, wide_u), dy.double())
    # A sigmoid near 0 is as exact as its argument, which for GELU is a cube.
    assert_close(native.gate(g, u, activation), expected, (g * u).abs().double() + 1e-30)
    both = native.gate_backward(g, u, dy, activation)
    assert both.shape == (rows, 2 * width)
    assert_close(both[:, :width], dg, 4 * (u * dy).abs().double() + 1e-30)
    assert_close(both[:, width:], du, (g * dy).abs().double() + 1e-30)


def test_silu_has_six_digits_everywhere(native: NativeLayers) -> None:
    g = torch.linspace(-80, 80, 100_001)[None]
    y = native.gate(g, torch.ones_like(g), "silu")
    expected = reference_gated_silu(g.double(), torch.ones_like(g).double())
    assert_close(y, expected, expected.abs())


@pytest.mark.parametrize("activation", GATES)
def test_gates_far_from_zero(native: NativeLayers, activation: Activation) -> None:
    g = torch.tensor([[-3e38, -1e20, -1000.0, -100.0, -90.0, 0.0, -0.0, 90.0, 100.0, 1e20, 3e38, 1e-40]])
    one = torch.ones_like(g)
    y, both = native.gate(g, one, activation), native.gate_backward(g, one, one, activation)
    assert torch.equal(y[0, :4].abs(), torch.zeros(4))
    assert torch.allclose(y, g.clamp(min=0.0), atol=1e-30)
    slopes = torch.where(g.abs() < 1, 0.5, (g > 0).float())
    assert torch.allclose(both, torch.cat([slopes, y], 1), atol=1e-30)


@pytest.mark.parametrize("size", [1e-4, 1.0, 30.0])
@pytest.mark.parametrize(("rows", "width"), [shape for shape in SHAPES if shape[0]])
def test_exponentials(native: NativeLayers, rows: int, width: int, size: float) -> None:
    z = columns(rows, width, 1, size)
    largest = z.double().amax(dim=1)
    exponents = z.double() - largest[:, None]
    expected = exponents.exp()
    found, sums = native.exponentials(z)
    assert torch.equal(found.double(), largest)
    # As exact as the difference, of float32 numbers.
    assert_close(z, expected, expected * (1 + exponents.abs()) + 1e-30)
    assert_close(sums, expected.sum(dim=1), 2 * expected.sum(dim=1))


@pytest.mark.parametrize("place", [0, 3, 12])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_exponentials_of_what_is_not_finite(native: NativeLayers, value: float, place: int) -> None:
    z = draw(3, 13)
    z[1, place] = value
    assert native.exponentials(z)[1].isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("width", [5, 40])
def test_what_is_not_finite_is_not_hidden(native: NativeLayers, activation: Activation, width: int) -> None:
    """As torch has it: NaN and infinities where there are, and nowhere else."""
    for value in (float("nan"), float("inf"), -float("inf")):
        x, other, one = draw(3, width), draw(3, width, seed=1), torch.ones(width)
        x[1, 3] = value
        leaves = x.clone().requires_grad_(), other.clone().requires_grad_()
        y = REFERENCE[activation](*leaves)
        assert_same_kinds(native.gate(x, other, activation), y)
        both = native.gate_backward(x, other, other, activation)
        assert not bool(both[1].isfinite().all())
        assert bool(both[::2].isfinite().all())
        assert_same_kinds(native.gate(other, x, activation), REFERENCE[activation](other, x))
        assert_same_kinds(native.rms_norm(x, one, EPSILON), reference_rms_norm(x, one, EPSILON))
        dx = native.rms_norm_backward(x, one, other, EPSILON)
        assert not bool(dx[1].isfinite().all())
        assert bool(dx[::2].isfinite().all())


def assert_same_kinds(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())


@needs_kernels
def test_norms_are_the_same_at_all_levels() -> None:
    x, weight, dy = columns(9, 333, 1), draw(333, seed=2), columns(9, 333, 3)
    all_levels = [found for name in LEVELS if (found := NativeLayers.best(name)) is not None]
    for one, other in pairwise(all_levels):
        assert torch.equal(one.rms_norm(x, weight, EPSILON), other.rms_norm(x, weight, EPSILON))
        backward = [each.rms_norm_backward(x, weight, dy, EPSILON) for each in (one, other)]
        assert torch.equal(*backward)


def test_operands_that_do_not_fit_are_refused(native: NativeLayers) -> None:
    x, weight = draw(4, 8), draw(8)
    for wrong in (x[:, :7], x[:3], x.double(), draw(8, 4).t(), x[0], x.to("meta")):
        for call in (
            lambda w: native.gate(x, w, "silu"),
            lambda w: native.gate(w, x, "silu"),
            lambda w: native.gate_backward(x, x, w, "silu"),
            lambda w: native.rms_norm_backward(x, weight, w, EPSILON),
        ):
            with pytest.raises(ParameterError):
                call(wrong)
    for wrong in (weight[:7], weight.double(), draw(16)[::2]):
        with pytest.raises(ParameterError):
            native.rms_norm(x, wrong, EPSILON)


# ---- Functions ----


def gradients(
    function: Callable[..., torch.Tensor], *inputs: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    y = function(*leaves)
    dy = draw(*y.shape, seed=9)
    return y.detach(), list(torch.autograd.grad((y * dy).sum(), leaves))


@pytest.mark.parametrize("shape", [(6,), (2, 3, 5), (1, 7, 40)])
def test_functions_have_the_gradients_of_the_formula(shape: tuple[int, ...]) -> None:
    """With whatever kernels there are."""
    x, u, weight = draw(*shape), draw(*shape, seed=1), draw(shape[-1], seed=2)
    y, found = gradients(lambda x: rms_norm(x, weight, EPSILON), x)
    expected_y, expected = gradients(lambda x: reference_rms_norm(x, weight, EPSILON), x)
    pairs = [(y, expected_y), *zip(found, expected, strict=True)]
    for activation in GATES:
        y, found = gradients(FUSED[activation], x, u)
        expected_y, expected = gradients(REFERENCE[activation], x, u)
        pairs += [(y, expected_y), *zip(found, expected, strict=True)]
    for one, other in pairs:
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_operands_may_lie_in_any_order() -> None:
    x, weight = draw(2, 3, 8).transpose(0, 1), draw(8, seed=1)
    assert torch.allclose(rms_norm(x, weight, EPSILON), reference_rms_norm(x, weight, EPSILON), atol=1e-6)
    g, u = draw(8, 5).t(), draw(5, 16, seed=1)[:, ::2]
    assert torch.allclose(gated_silu(g, u), reference_gated_silu(g, u), atol=1e-6)


@needs_kernels
def test_the_gradients_of_a_gate_lie_side_by_side() -> None:
    g, u = draw(1, 4, 8).requires_grad_(), draw(1, 4, 8, seed=1).requires_grad_()
    dg, du = torch.autograd.grad(gated_silu(g, u).sum(), (g, u))
    assert dg.untyped_storage().data_ptr() == du.untyped_storage().data_ptr()
    assert dg.stride() == du.stride()
    assert (dg.stride(1), du.storage_offset() - dg.storage_offset()) == (16, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_left_to_torch(dtype: torch.dtype) -> None:
    x, u, weight = draw(3, 8).to(dtype), draw(3, 8, seed=1).to(dtype), draw(8).to(dtype)
    assert torch.equal(rms_norm(x, weight, EPSILON), reference_rms_norm(x, weight, EPSILON))
    assert torch.equal(gated_silu(x, u), reference_gated_silu(x, u))
    assert torch.equal(gated_gelu(x, u), reference_gated_gelu(x, u))


def test_a_weight_that_is_trained_gets_its_gradient() -> None:
    x, weight = draw(3, 8), draw(8).requires_grad_()
    (found,) = torch.autograd.grad(rms_norm(x, weight, EPSILON).sum(), weight)
    (expected,) = torch.autograd.grad(reference_rms_norm(x, weight, EPSILON).sum(), weight)
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("no_kernels")
def test_without_a_compiler_torch_does_it() -> None:
    x, u, weight = draw(3, 8), draw(3, 8, seed=1), draw(8)
    assert layer_kernels() is None
    assert torch.equal(rms_norm(x, weight, EPSILON), reference_rms_norm(x, weight, EPSILON))
    assert torch.equal(gated_silu(x, u), reference_gated_silu(x, u))


def test_the_environment_lowers_the_instruction_set(
    monkeypatch: pytest.MonkeyPatch, native: NativeLayers
) -> None:
    monkeypatch.setenv(compiled.VARIABLE, native.name)
    assert NativeLayers.best() == native
    monkeypatch.setenv(compiled.VARIABLE, "sse9")
    with pytest.raises(UsageError, match="sse9"):
        NativeLayers.best()


def test_the_environment_turns_the_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.VARIABLE, "torch")
    layers_library.library.cache_clear()
    try:
        assert NativeLayers.best() is None
    finally:
        layers_library.library.cache_clear()


# ---- Memory ----

WIDTH = 256


def stored_and_gradients() -> tuple[int, list[torch.Tensor]]:
    """Values that a gated MLP over a norm stores, and its gradients."""
    generator = torch.Generator().manual_seed(3)
    weight = [torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / 16) for _ in range(3)]
    scale, x = torch.rand(WIDTH, generator=generator), torch.randn(128, WIDTH, generator=generator)
    inputs, saver = x.requires_grad_(), HalfSaver(weight)
    with saver.saving():
        normed = rms_norm(inputs, scale, EPSILON)
        loss = (gated_silu(normed @ weight[0], normed @ weight[1]) @ weight[2]).square().mean()
    return saver.stored_values, list(torch.autograd.grad(loss, [inputs, *weight]))


def test_results_are_computed_again_rather_than_stored(request: pytest.FixtureRequest) -> None:
    stored, found = stored_and_gradients()
    assert stored == 4 * 128 * WIDTH  # the norm's input, gate, up, and what the square is of
    request.getfixturevalue("no_kernels")
    without, expected = stored_and_gradients()
    assert without == stored
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-3


# ---- Models ----


def tiny(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(FAMILIES[family].model_type, **FAMILIES[family].config)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of fused functions, as they are called."""
    made: list[str] = []
    for name in ("rms_norm", "rms_norm_backward", "gate", "gate_backward"):
        original = getattr(NativeLayers, name)

        def counted(self: NativeLayers, *a: object, name: str = name, original: object = original) -> object:
            made.append(name)
            return original(self, *a)

        monkeypatch.setattr(NativeLayers, name, counted)
    return made


@needs_kernels
@pytest.mark.parametrize(
    ("family", "norms", "gates"),
    [
        ("llama", 5, 2),
        ("mistral", 5, 2),
        ("qwen2", 5, 2),
        ("qwen3", 9, 2),
        ("gemma", 5, 2),
        ("gemma2", 9, 2),
        ("gemma3", 13, 2),
        ("phi3", 5, 2),
        ("glm4", 9, 2),
        ("olmo2", 9, 2),
        ("granite", 5, 2),
        ("smollm3", 5, 2),
        ("cohere", 0, 2),
        ("gpt2", 0, 0),
    ],
)
def test_known_layers_are_fused_and_give_the_same(
    family: str, norms: int, gates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = tiny(family), torch.arange(3, 14)[None]
    expected = model(input_ids=tokens, use_cache=False).logits
    fuse_layers(model)
    made = calls(monkeypatch)
    found = model(input_ids=tokens, use_cache=False).logits
    assert (made.count("rms_norm"), made.count("gate")) == (norms, gates)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    made.clear()
    with as_in_transformers(model):
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, expected)
    assert not made
    assert torch.equal(model(input_ids=tokens, use_cache=False).logits, found)
    assert bool(made) == bool(norms + gates)


def test_a_copy_has_its_own_layers() -> None:
    model = tiny("llama")
    fuse_layers(model)
    other = copy.deepcopy(model)
    tokens = torch.arange(3, 14)[None]
    before = model(input_ids=tokens, use_cache=False).logits
    assert torch.equal(other(input_ids=tokens, use_cache=False).logits, before)
    for parameter in other.parameters():
        parameter.mul_(0.5)
    assert not torch.allclose(other(input_ids=tokens, use_cache=False).logits, before)
    assert torch.equal(model(input_ids=tokens, use_cache=False).logits, before)
    assert [type(module) for module in model.modules()] == [type(module) for module in other.modules()]


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
def test_a_split_model_trains_on_fused_layers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(FAMILIES[family], tmp_path)
    harness = SplitHarness(tmp_path)
    made = calls(monkeypatch)
    assert_faithful(harness)
    assert set(made) == {"rms_norm", "rms_norm_backward", "gate", "gate_backward"}


@pytest.mark.parametrize("name", ["rms_norm", "gated_silu"])
def test_the_trial_finds_a_layer_that_computes_something_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(FAMILIES["llama"], tmp_path)
    original = getattr(fused, name)

    def wrong(x: torch.Tensor, *rest: object) -> torch.Tensor:
        return original(x, *rest) * (1 + 0.1 * x.sin())

    monkeypatch.setattr(fused, name, wrong)
    monkeypatch.setitem(fused.GATED, "silu", fused.gated_silu)
    with pytest.raises(UnsupportedArchitecture):
        SplitHarness(tmp_path)
