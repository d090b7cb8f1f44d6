"""Integer products modulo 2^32 are exact, or not used."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetrain.public.errors import UsageError, WorkerError
from worker_gpu import device
from worker_gpu.device import choose_compute, choose_device, is_exact
from worker_gpu.engines.rlwe import switch_a, switch_b
from worker_gpu.kernels import KERNELS, Kernel, float64_limbs, int8_limbs, reference

CPU = torch.device("cpu")
DEVICE = choose_device()  # the one a worker would take here; `make gpu-check` makes it CUDA
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
ALL = pytest.mark.parametrize("kernel", [int8_limbs, float64_limbs, reference])
SIZE = st.integers(1, 70)


def plain_product(weights: torch.Tensor, operand: torch.Tensor) -> list[list[int]]:
    """W·X mod 2^32, signed, in Python integers."""
    columns = operand.t().tolist()
    rows = weights.tolist()
    return [[signed(sum(w * x for w, x in zip(row, c, strict=True))) for c in columns] for row in rows]


def run(kernel: Kernel, weights: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    """The kernel's product on the device under test."""
    if kernel is reference:
        return kernel(weights, operand)
    return kernel(weights.to(DEVICE), operand.to(DEVICE)).cpu()


def signed(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def random_pair(n: int, k: int, m: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(-128, 128, (n, k), generator=generator).to(torch.int8)
    operand = torch.randint(INT32_MIN, INT32_MAX + 1, (k, m), generator=generator).to(torch.int32)
    return weights, operand


@ALL
@settings(max_examples=25, deadline=None)
@given(n=SIZE, k=SIZE, m=SIZE, seed=st.integers(0, 2**32), transposed=st.booleans())
def test_products_of_any_shape_are_exact(
    kernel: Kernel, n: int, k: int, m: int, seed: int, transposed: bool
) -> None:
    weights, operand = random_pair(n, k, m, seed)
    laid_out = weights.t().contiguous().t() if transposed else weights
    result = run(kernel, laid_out, operand)
    assert result.dtype == torch.int32
    assert result.tolist() == plain_product(weights, operand)


@ALL
@pytest.mark.parametrize("weight", [-128, -127, 127])
@pytest.mark.parametrize(
    "word", [INT32_MIN, INT32_MAX, -1, 0x7F7F7F7F, signed(0x80808080), 0x0000FF80, 0x7FFF8000, 0x00007FFF]
)
def test_extreme_products_are_exact(kernel: Kernel, weight: int, word: int) -> None:
    n, k, m = 3, 515, 9
    weights = torch.full((n, k), weight, dtype=torch.int8)
    result = run(kernel, weights, torch.full((k, m), word, dtype=torch.int32))
    assert result.tolist() == [[signed(k * weight * word)] * m] * n


@ALL
def test_a_slice_of_a_transposed_matrix_is_exact(kernel: Kernel) -> None:
    """What a shard of a backward product passes: columns start:stop of a stored matrix."""
    weights, operand = random_pair(40, 64, 24, seed=1)
    shard = weights.t()[5:39]
    assert run(kernel, shard, operand[:40]).tolist() == plain_product(shard, operand[:40])


@pytest.mark.parametrize("kernel", [int8_limbs, float64_limbs])
def test_products_of_real_size_agree_with_the_reference(kernel: Kernel) -> None:
    weights, operand = random_pair(96, 1536, 256, seed=2)
    assert torch.equal(run(kernel, weights, operand), reference(weights, operand))


def test_both_kernels_count_as_exact_and_one_is_chosen() -> None:
    assert all(is_exact(kernel, DEVICE) for kernel in KERNELS.values())
    compute = choose_compute(DEVICE)
    assert compute.kernel is KERNELS[compute.kernel_name]
    assert compute.kernel_name in compute.description


def saturating(weights: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    """Clamps where int32 should wrap."""
    exact = weights.to(torch.int64) @ operand.to(torch.int64)
    return exact.clamp(INT32_MIN, INT32_MAX).to(torch.int32)


def saturating_pairs(weights: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    """int8 limbs whose neighbouring products are added in saturating int16, as AVX2 without VNNI does."""
    k = weights.shape[1] + weights.shape[1] % 2
    w = torch.nn.functional.pad(weights.to(torch.int64), (0, k - weights.shape[1]))
    x = torch.nn.functional.pad(operand.to(torch.int64), (0, 0, 0, k - weights.shape[1]))
    result = torch.zeros(w.shape[0], x.shape[1], dtype=torch.int64)
    for position in range(4):
        digit = (x >> (8 * position)) & 0xFF if position < 3 else x >> 24
        pairs = w[:, 0::2, None] * digit[None, 0::2] + w[:, 1::2, None] * digit[None, 1::2]
        result += pairs.clamp(-(2**15), 2**15 - 1).sum(dim=1) << (8 * position)
    return result.to(torch.int32)


def wrong_when_large(weights: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    """Right on small matrices only, as where a library changes routine with size."""
    return reference(weights, operand) + int(weights.shape[1] > 128)


def wrong_when_transposed(weights: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    return reference(weights, operand) + int(not weights.is_contiguous())


def not_there(weights: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("this device has no such product")


WRONG = [saturating, saturating_pairs, wrong_when_large, wrong_when_transposed, not_there]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_is_rejected_however_fast(monkeypatch: pytest.MonkeyPatch, wrong: Kernel) -> None:
    monkeypatch.setitem(KERNELS, "int8", wrong)
    monkeypatch.setattr(device, "measure_seconds", lambda kernel, _: 0.0 if kernel is wrong else 1.0)
    assert choose_compute(CPU).kernel is float64_limbs


def test_a_device_without_an_exact_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(KERNELS):
        monkeypatch.setitem(KERNELS, name, saturating)
    with pytest.raises(WorkerError, match="exact"):
        choose_compute(CPU)


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "hpu"])
def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HETRAIN_DEVICE", name)
    with pytest.raises(UsageError, match=name) as error:
        choose_device()
    assert error.value.where == "HETRAIN_DEVICE"
    assert error.value.hint


def test_the_device_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETRAIN_DEVICE", "cpu")
    assert choose_device() == CPU


@pytest.fixture(scope="module")
def switched() -> torch.Tensor:
    """Values around every edge of rounding and of the modulus, and random ones."""
    edges = [
        base + step
        for base in (INT32_MIN, -(2**16), -(2**15), -(2**8), 0, 2**7, 2**8, 2**15)
        for step in (0, 1)
    ]
    edges += [-1, 127, 2**15 - 1, 2**16, INT32_MAX, INT32_MAX - 127, INT32_MAX - 128]
    edges += [INT32_MAX - 2**15 + step for step in (-1, 0, 1)]
    random = torch.randint(INT32_MIN, INT32_MAX + 1, (4000,), generator=torch.Generator().manual_seed(3))
    return torch.cat([torch.tensor(edges), random]).to(torch.int32)


def test_switch_b_rounds_modulo_2_to_the_16(switched: torch.Tensor) -> None:
    result = switch_b(switched)
    assert result.dtype == torch.int16
    for value, rounded in zip(switched.tolist(), result.tolist(), strict=True):
        assert (rounded - (value + 2**15) // 2**16) % 2**16 == 0
        assert -(2**15) < signed((rounded << 16) - value) <= 2**15


def test_switch_a_rounds_modulo_2_to_the_24(switched: torch.Tensor) -> None:
    high, low = switch_a(switched)
    assert (high.dtype, low.dtype) == (torch.int16, torch.uint8)
    for value, h, l in zip(switched.tolist(), high.tolist(), low.tolist(), strict=True):  # noqa: E741
        assert ((h << 8) + l - (value + 2**7) // 2**8) % 2**24 == 0
        assert -(2**7) < signed((h << 16) + (l << 8) - value) <= 2**7
