"""A worker's products are exact, or not used; its engines answer in the formats that clients read."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetrain.public.compiled import INSTRUCTION_SETS
from hetrain.public.errors import ParameterError, UsageError, WireError, WorkerError
from hetrain.public.lattice.masks import PublicSeed
from hetrain.public.lattice.parameters import PARAMETER_SETS, ParameterSet
from hetrain.public.lattice.result_format import ResultFormat, hint_bytes, read_hint, unpack
from hetrain.public.lattice.ring import MODULUS
from hetrain.public.lattice.uniform_masks import expand_masks
from hetrain.public.protocol.messages import Blob, EvaluateTask
from tests.harness import plain_ring as plain
from worker_gpu import epilogue, int16
from worker_gpu.device import choose_compute, choose_device, is_exact, preferred, switches
from worker_gpu.engines import open_engine
from worker_gpu.epilogue import Epilogue
from worker_gpu.kernels import (
    KERNELS,
    Kernel,
    combined,
    float64_products,
    int8_products,
    int16_products,
    reference,
    slabs,
)

CPU = torch.device("cpu")
DEVICE = choose_device()  # the one a worker would take here; `make gpu-check` makes it CUDA
COMPUTE = choose_compute(DEVICE)
HAS_INT16 = DEVICE == CPU and int16.best_instructions() is not None
INT16_LEVELS = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(int16.best_instructions() or "portable") + 1]
INT16 = [
    pytest.param(
        partial(int16_products, instructions=name),
        id=f"int16-{name}",
        marks=pytest.mark.skipif(
            not HAS_INT16 or name not in INT16_LEVELS, reason=f"no compiled kernel for {name} here"
        ),
    )
    for name in INSTRUCTION_SETS
]
FAST = pytest.mark.parametrize("kernel", [int8_products, *INT16, float64_products])
ALL = pytest.mark.parametrize("kernel", [int8_products, *INT16, float64_products, reference])
SIZE = st.integers(1, 70)
TOKEN = "0" * 32


def plain_product(planes: torch.Tensor, matrix: torch.Tensor) -> list[list[int]]:
    """c·Wᵀ in Python integers."""
    operand = [
        [plain.value(digits) for digits in zip(*token, strict=True)]
        for token in planes.transpose(0, 1).tolist()
    ]
    rows = matrix.tolist()
    return [[sum(w * c for w, c in zip(row, token, strict=True)) for row in rows] for token in operand]


def run(kernel: Kernel, planes: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """The kernel's products on the device under test, combined."""
    if kernel is reference:
        return kernel(planes, matrix)
    products = kernel(planes.to(DEVICE), matrix.to(DEVICE)).cpu()
    assert products.dtype == torch.int32
    assert products.shape == (len(planes), planes.shape[1], len(matrix))
    return combined(products, torch.int64)


def random_pair(count: int, n: int, k: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    planes = torch.randint(-128, 128, (count, tokens, k), generator=generator).to(torch.int8)
    return planes, torch.randint(-128, 128, (n, k), generator=generator).to(torch.int8)


# ---- Products ----


@ALL
@settings(max_examples=25, deadline=None)
@given(count=st.integers(3, 4), n=SIZE, k=SIZE, m=SIZE, seed=st.integers(0, 2**32), transposed=st.booleans())
def test_products_of_any_shape_are_exact(
    kernel: Kernel, count: int, n: int, k: int, m: int, seed: int, transposed: bool
) -> None:
    planes, matrix = random_pair(count, n, k, m, seed)
    laid_out = matrix.t().contiguous().t() if transposed else matrix
    assert run(kernel, planes, laid_out).tolist() == plain_product(planes, matrix)


@ALL
@pytest.mark.parametrize("weight", [-128, -127, 127])
@pytest.mark.parametrize(
    "digits", [(-128,) * 3, (127,) * 3, (-1, 0, 0), (-128, 127, -128), (-128,) * 4, (127,) * 4]
)
def test_extreme_products_are_exact(kernel: Kernel, weight: int, digits: tuple[int, ...]) -> None:
    n, k, m = 3, 515, 9
    planes = torch.tensor(digits, dtype=torch.int8)[:, None, None].expand(-1, m, k).contiguous()
    result = run(kernel, planes, torch.full((n, k), weight, dtype=torch.int8))
    assert result.tolist() == [[k * weight * plain.value(digits)] * n] * m


@ALL
@pytest.mark.parametrize("count", [3, 4])
def test_the_widest_products_are_exact(kernel: Kernel, count: int) -> None:
    """Where sums come closest to 2^31, and float64 and int16 take several of them."""
    planes = torch.full((count, 2, 130_000), -128, dtype=torch.int8)
    result = run(kernel, planes, torch.full((1, 130_000), -128, dtype=torch.int8))
    assert result.tolist() == [[130_000 * -128 * plain.value([-128] * count)]] * 2


@FAST
def test_wider_products_are_refused(kernel: Kernel) -> None:
    with pytest.raises(ParameterError, match="130001"):
        kernel(torch.zeros(3, 1, 130_001, dtype=torch.int8), torch.zeros(1, 130_001, dtype=torch.int8))


@ALL
def test_a_slice_of_a_transposed_matrix_is_exact(kernel: Kernel) -> None:
    """What a shard of a backward product passes: columns start:stop of a stored matrix."""
    planes, matrix = random_pair(3, 40, 64, 24, seed=1)
    shard = matrix.t()[5:39]
    some = planes[:, :, :40].contiguous()
    assert run(kernel, some, shard).tolist() == plain_product(some, shard)


@FAST
def test_products_of_real_size_agree_with_the_reference(kernel: Kernel) -> None:
    planes, matrix = random_pair(3, 96, 1536, 256, seed=2)
    assert torch.equal(run(kernel, planes, matrix), reference(planes, matrix))


@pytest.mark.parametrize("kernel", INT16)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("count", "tokens", "k", "n"),
    [(3, 97, 2047, 45), (3, 1, 4097, 700), (4, 41, 2080, 33), (4, 7, 4101, 641), (3, 5, 9000, 31)],
)
def test_int16_products_of_several_blocks_are_exact(
    kernel: Kernel, count: int, tokens: int, k: int, n: int, transposed: bool
) -> None:
    """Ragged at every edge of a block. Nothing that was in the memory before shows."""
    planes, matrix = random_pair(count, n, k, tokens, seed=n)
    kernel(torch.full_like(planes, 127), torch.full_like(matrix, 127))
    laid_out = matrix.t().contiguous().t() if transposed else matrix
    assert torch.equal(run(kernel, planes, laid_out), reference(planes, matrix))


@pytest.mark.parametrize("kernel", INT16)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("tokens", "n"), [(300, 64), (64, 300)])
def test_int16_products_are_the_same_in_any_number_of_threads(
    kernel: Kernel, threads: int, tokens: int, n: int
) -> None:
    planes, matrix = random_pair(3, n, 500, tokens, seed=threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(run(kernel, planes, matrix.t().contiguous().t()), reference(planes, matrix))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not HAS_INT16, reason="no compiled kernel here")
def test_int16_refuses_what_it_cannot_read() -> None:
    planes, matrix = random_pair(3, 6, 8, 4, seed=5)
    assert torch.equal(run(int16_products, planes, matrix), reference(planes, matrix))
    for wrong, w in (
        (planes[:2], matrix),
        (planes[:, :0], matrix),
        (planes[:, :, ::2], matrix[:, :4]),
        (planes.to(torch.int16), matrix),
        (planes, matrix[:, :7]),
        (planes, matrix.to(torch.float32)),
        (planes[:, :, :4].contiguous(), matrix[:, ::2]),
    ):
        with pytest.raises(ParameterError):
            int16_products(wrong, w)


@pytest.mark.skipif(shutil.which("cc") is None, reason="there was no C compiler when hetrain was installed")
def test_int16_is_compiled_where_there_is_a_compiler() -> None:
    assert int16.best_instructions() is not None, "reinstall hetrain (pip install --editable .)"


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (64, 2048), (3000, 2048), (3072, 256), (700, 100_000)])
def test_slabs_cover_all_rows_in_multiples_of_a_group(rows: int, tokens: int) -> None:
    parts = list(slabs(torch.empty(3, tokens, 1, dtype=torch.int8), rows))
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
    assert all(part.start % 64 == 0 for part in parts)
    assert max(part.stop - part.start for part in parts) <= max((1 << 24) // (3 * tokens), 64)


# ---- What a worker chooses ----


def test_every_kernel_counts_as_exact_and_one_is_chosen() -> None:
    exact = {name for name, kernel in KERNELS.items() if is_exact(kernel, DEVICE)}
    assert exact == set(KERNELS) - (set() if HAS_INT16 else {"int16"})
    assert switches(epilogue.REFERENCE, DEVICE)
    assert COMPUTE.kernel is KERNELS[COMPUTE.kernel_name]
    assert COMPUTE.kernel_name in COMPUTE.description
    assert COMPUTE.epilogue.name in COMPUTE.description
    assert COMPUTE.epilogue == epilogue.REFERENCE or DEVICE == CPU


def saturating(planes: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Clamps at 2^15."""
    exact = planes.to(torch.int64) @ matrix.to(torch.int64).t()
    return exact.clamp(-(2**15), 2**15 - 1).to(torch.int32)


def saturating_pairs(planes: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Neighbouring products are added in saturating int16, as AVX2 without VNNI does."""
    odd = planes.shape[2] % 2
    x = torch.nn.functional.pad(planes.to(torch.int64) + 128, (0, odd))
    w = torch.nn.functional.pad(matrix.to(torch.int64), (0, odd))
    result = -128 * matrix.to(torch.int64).sum(dim=1).expand(*planes.shape[:2], -1).clone()
    for k in range(0, x.shape[2], 2):
        pair = x[:, :, None, k] * w[:, k] + x[:, :, None, k + 1] * w[:, k + 1]
        result += pair.clamp(-(2**15), 2**15 - 1)
    return result.to(torch.int32)


def wrong_when_large(planes: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Right on small matrices only, as where a library changes routine with size."""
    return int8_products(planes, matrix) + int(matrix.shape[1] > 128)


def wrong_when_transposed(planes: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return int8_products(planes, matrix) + int(not matrix.is_contiguous())


def wrong_with_four_digits(planes: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """As for operands, but not for masks."""
    return int8_products(planes, matrix) + int(len(planes) > 3)


def not_there(planes: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("this device has no such product")


def fast_when_large(kernel: Kernel) -> Kernel:
    """`kernel`, but at the size that is timed it returns at once."""

    def multiply(planes: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        if planes.shape[1] > 256:
            return torch.zeros(1, 1, 1, dtype=torch.int32)
        return kernel(planes, matrix)

    return multiply


WRONG = [
    saturating,
    saturating_pairs,
    wrong_when_large,
    wrong_when_transposed,
    wrong_with_four_digits,
    not_there,
]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_is_rejected_however_fast(monkeypatch: pytest.MonkeyPatch, wrong: Kernel) -> None:
    for name in ("int8", "int16"):
        monkeypatch.setitem(KERNELS, name, fast_when_large(wrong))
    assert choose_compute(CPU).kernel is float64_products


def test_a_device_without_an_exact_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(KERNELS):
        monkeypatch.setitem(KERNELS, name, saturating)
    with pytest.raises(WorkerError, match="exact"):
        choose_compute(CPU)


def test_a_wrong_epilogue_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_one(products: torch.Tensor, out: torch.Tensor) -> None:
        epilogue.REFERENCE.switch(products, out)
        out[-1, -1] ^= 1

    monkeypatch.setattr(epilogue, "native", lambda: Epilogue("wrong", off_by_one))
    assert choose_compute(CPU).epilogue == epilogue.REFERENCE


@pytest.mark.parametrize(
    ("int8", "int16", "float64", "chosen"),
    [
        ([3.0, 2.0, 9.0], [1.5, 1.9, 1.4], [2.5, 2.5, 2.5], "int8"),  # one round under load decides nothing
        ([1.0, 5.0], [0.9, 0.8], [0.9, 0.7], "int8"),
        ([4.0, 3.0], [1.9, 2.5], [2.4, 4.0], "int16"),
        ([4.0, 3.0], [2.4, 4.0], [1.9, 2.5], "float64"),
        ([1.0], [7.0], [7.0], "int8"),
    ],
)
def test_int8_is_chosen_unless_its_best_round_is_clearly_slower_than_another(
    int8: list[float], int16: list[float], float64: list[float], chosen: str
) -> None:
    assert preferred({"int8": int8, "int16": int16, "float64": float64}) == chosen


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


# ---- Engines ----


def evaluate(engine: str, matrix: torch.Tensor, payload: bytes, **header: str) -> memoryview:
    """What the engine answers for this matrix, on the device under test."""
    task = EvaluateTask(
        request=TOKEN,
        job=TOKEN,
        model="model",
        engine=engine,
        plan=Blob(job=TOKEN, kind="plan", token=TOKEN, nbytes=0),
        plan_digest=TOKEN,
        group="group",
        direction="forward",
        start=0,
        stop=len(matrix),
        header=dict(header),
        input=Blob(job=TOKEN, kind="in", token=TOKEN, nbytes=len(payload)),
    )
    (part,) = open_engine(engine, COMPUTE).evaluate(matrix.to(DEVICE), task, memoryview(bytearray(payload)))
    return part


@pytest.mark.parametrize("parameters", PARAMETER_SETS.values(), ids=list(PARAMETER_SETS))
@pytest.mark.parametrize(("n", "k", "transposed"), [(1, 1, False), (77, 33, True), (1500, 64, False)])
def test_results_are_switched_products(parameters: ParameterSet, n: int, k: int, transposed: bool) -> None:
    """1500 rows make several slabs of the largest set's."""
    degree, sizes = parameters.ring_degree, ResultFormat(parameters)
    planes, matrix = random_pair(3, n, k, degree, seed=n)
    laid_out = matrix.t().contiguous().t() if transposed else matrix
    header = {"parameters": parameters.name, "operand": "ciphertext"}
    part = evaluate("rlwe", laid_out, planes.numpy().tobytes(), **header)
    u = unpack(sizes.read_result(part, n, where="test"), n).to(torch.int64)
    b = 64 * reference(planes, matrix) % MODULUS
    assert torch.equal(u, (b * plain.LEVELS + MODULUS // 2) // MODULUS % plain.LEVELS)


@pytest.mark.parametrize(("n", "k", "transposed"), [(1, 1, False), (37, 300, True), (600, 16, False)])
def test_hints_are_products_with_the_masks(n: int, k: int, transposed: bool) -> None:
    _, matrix = random_pair(3, n, k, 1, seed=n)
    laid_out = matrix.t().contiguous().t() if transposed else matrix
    seed = PublicSeed(bytes(range(32)))
    part = evaluate("rlwe", laid_out, seed.value, parameters="rlwe-512x4", operand="mask_seed")
    assert part.nbytes == hint_bytes(n)
    hint = read_hint(part, n, where="test").transpose(1, 2).reshape(-1, 2048).to(torch.int64)
    masks = expand_masks(seed, k).transpose(1, 2).reshape(-1, 2048)[:k].to(torch.int64)
    assert torch.equal(hint[:n], matrix.to(torch.int64) @ masks % MODULUS)
    assert not hint[n:].any()


@pytest.mark.parametrize("tokens", [1, 300])
def test_clear_results_are_the_sums(tokens: int) -> None:
    planes, matrix = random_pair(3, 70, 50, tokens, seed=3)
    part = evaluate("clear", matrix, planes.numpy().tobytes())
    expected = reference(planes, matrix).to(torch.int32)
    assert torch.equal(torch.frombuffer(part, dtype=torch.int32).view(tokens, 70), expected)


@pytest.mark.parametrize(
    ("engine", "header", "nbytes"),
    [
        ("rlwe", {"parameters": "rlwe-256x8", "operand": "ciphertext"}, 3 * 256 * 8 + 1),
        ("rlwe", {"parameters": "rlwe-256x8", "operand": "ciphertext"}, 0),
        ("rlwe", {"parameters": "rlwe-512x4", "operand": "ciphertext"}, 3 * 256 * 8),
        ("rlwe", {"parameters": "rlwe-256x8", "operand": "mask_seed"}, 31),
        ("rlwe", {"parameters": "rlwe-256x8", "operand": "mask_seed"}, 3 * 256 * 8),
        ("rlwe", {"parameters": "rlwe-256x8", "operand": "result"}, 32),
        ("rlwe", {"parameters": "rlwe-16x2", "operand": "ciphertext"}, 3 * 16 * 8),
        ("rlwe", {"parameters": "rlwe-256x8"}, 32),
        ("clear", {}, 0),
        ("clear", {}, 3 * 8 + 1),
        ("clear", {"operand": "ciphertext"}, 3 * 8),
    ],
)
def test_other_operands_are_refused(engine: str, header: dict[str, str], nbytes: int) -> None:
    with pytest.raises(WireError) as error:
        evaluate(engine, torch.ones(5, 8, dtype=torch.int8), bytes(nbytes), **header)
    assert error.value.where == "group"
