"""Encryption is exact ring arithmetic plus noise of the size that was promised."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch

from hetrain.public.errors import NotFinite, ParameterError, WireError
from hetrain.public.lattice.masks import PublicSeed, expand_mask
from hetrain.public.lattice.parameters import (
    PARAMETER_SETS,
    SWITCHED_B_BITS,
    ParameterSet,
    largest_operand,
    parameters_for,
    switching_error_bound,
)
from hetrain.public.model.quantization import max_l1
from hetrain.public.protocol.messages import Blob, EvaluateTask
from hetrain.public.protocol.product import Part
from hetrain.secret.activation_quantization import quantize_operand
from hetrain.secret.engines import clear
from hetrain.secret.engines.rlwe import seal as rlwe
from hetrain.secret.engines.rlwe.kernels import BLOCK_ROWS, TorchKernels, join_planes, kernels
from hetrain.secret.engines.rlwe.negacyclic import TransformedSecret, reference_dot
from hetrain.secret.engines.rlwe.seal import RlweOpening, RlweSealed, encrypt, predicted_noise_std, seal
from hetrain.secret.randomness import SecretStream, sample_ternary
from worker_gpu.device import choose_compute, choose_device
from worker_gpu.engines import open_engine
from worker_gpu.kernels import reference

INSECURE = ParameterSet("insecure-16x2", 16, 2)
REAL = list(PARAMETER_SETS.values())
EVERY_SET = pytest.mark.parametrize("parameters", [INSECURE, *REAL], ids=lambda p: p.name)
COMPUTE = choose_compute(choose_device())  # `make gpu-check` makes it CUDA
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
TOKEN = "0" * 32


def signed(values: np.ndarray) -> np.ndarray:
    """Representatives in -2^31..2^31-1."""
    return (values + 2**31) % 2**32 - 2**31


def schoolbook(masks: torch.Tensor, secret: torch.Tensor) -> np.ndarray:
    """Σ_i a_i·s_i in Z[X]/(X^N + 1), every row, in int64: direct convolution, where no value passes 2^42."""
    rank, n = secret.shape
    rows = []
    for mask in masks.to(torch.int64).numpy().reshape(len(masks), rank, n):
        full = sum(np.convolve(a, s) for a, s in zip(mask, secret.to(torch.int64).numpy(), strict=True))
        rows.append(full[:n] - np.append(full[n:], 0))
    return signed(np.stack(rows))


def random_words(*shape: int) -> torch.Tensor:
    return torch.randint(INT32_MIN, INT32_MAX + 1, shape, dtype=torch.int64).to(torch.int32)


def ternary_secret(parameters: ParameterSet) -> torch.Tensor:
    values = sample_ternary(SecretStream("test"), parameters.dimension)
    return values.view(parameters.rank, parameters.ring_degree)


def dot(secret: torch.Tensor, masks: torch.Tensor) -> np.ndarray:
    return TransformedSecret(secret).dot(masks).reshape(len(masks), -1).numpy()


@EVERY_SET
def test_products_equal_the_reference(parameters: ParameterSet) -> None:
    masks, secret = random_words(1, parameters.dimension), ternary_secret(parameters)
    polynomials = masks.view(parameters.rank, parameters.ring_degree).tolist()
    expected = reference_dot(polynomials, secret.tolist())
    assert schoolbook(masks, secret)[0].tolist() == expected
    assert dot(secret, masks)[0].tolist() == expected


@EVERY_SET
def test_products_of_extremes_are_exact(parameters: ParameterSet) -> None:
    """Largest masks against secrets that add them all up: where rounding a transform would fail first."""
    d, n = parameters.rank, parameters.ring_degree
    alternating = 1 - 2 * (torch.arange(d * n) % 2)
    ones = torch.ones(d, n, dtype=torch.int8)
    secrets = [ones, -ones, alternating.view(d, n).to(torch.int8), ternary_secret(parameters)]
    rows = [
        torch.full((d * n,), INT32_MIN),
        torch.full((d * n,), INT32_MAX),
        alternating * INT32_MAX,
        torch.where(alternating > 0, INT32_MIN, INT32_MAX),
        *torch.where(torch.rand(3, d * n) < 0.5, INT32_MIN, INT32_MAX),
    ]
    masks = torch.stack(rows).to(torch.int32)
    for secret in secrets:
        assert np.array_equal(dot(secret, masks), schoolbook(masks, secret))


@pytest.mark.parametrize("parameters", REAL, ids=lambda p: p.name)
def test_products_of_many_rows_are_exact(parameters: ParameterSet) -> None:
    secret = ternary_secret(parameters)
    rows = TransformedSecret(secret).block_rows + 3
    masks = random_words(rows, parameters.dimension)
    some = [0, 1, rows - 2, rows - 1]
    assert np.array_equal(dot(secret, masks)[some], schoolbook(masks[some], secret))


@EVERY_SET
@pytest.mark.parametrize("extra_rows", [1, 0, 3])
def test_ciphertexts_are_mask_times_secret_plus_noise_plus_message(
    parameters: ParameterSet, extra_rows: int
) -> None:
    """b − a·s − m, exactly in the ring, is noise within ±eta; also where rows do not fill the last block."""
    secret, seed = ternary_secret(parameters), PublicSeed.fresh()
    k, tokens = BLOCK_ROWS + extra_rows, parameters.ring_degree - 3
    x = torch.randint(-(2**24), 2**24 + 1, (tokens, k)).to(torch.float32)
    b = encrypt(x, torch.ones(tokens), 2**24, seed, kernels().transform(secret), parameters)
    assert (b.dtype, b.shape) == (torch.int32, (k, parameters.ring_degree))
    some = [0, k // 2, *range(max(k - 4, 0), k)]
    masks = expand_mask(seed, k, parameters.dimension)[some]
    padded = np.zeros((len(some), parameters.ring_degree), np.int64)
    padded[:, :tokens] = x.t()[some].numpy()
    noise = signed(b[some].numpy().astype(np.int64) - schoolbook(masks, secret) - padded)
    assert np.abs(noise).max() <= parameters.eta
    assert noise.std() == pytest.approx(parameters.noise_std, rel=8 / math.sqrt(2 * noise.size))
    assert not np.array_equal(noise[-1], noise[-2])


def test_quantisation_uses_the_whole_range_and_rounds_to_nearest() -> None:
    x = torch.randn(50, 70) * torch.logspace(-20, 20, 50)[:, None]
    operand = quantize_operand(x, 30_001)
    assert operand.values.abs().amax(0).tolist() == [30_001] * 50
    error = x.double() - operand.values.t().double() * operand.scales[:, None].double()
    assert bool((error.abs() <= 0.51 * operand.scales[:, None]).all())


def evaluate(matrix: torch.Tensor, sealed: RlweSealed | clear.ClearSealed, name: str = "rlwe") -> memoryview:
    """What the worker's half answers, as one blob."""
    blob = Blob(job=TOKEN, kind="in", token=TOKEN, nbytes=sum(part.nbytes for part in sealed.operand.payload))
    task = EvaluateTask(
        request=TOKEN, job=TOKEN, model="m", engine=name, plan=blob, plan_digest=TOKEN, group="g",
        direction="forward", start=0, stop=len(matrix), header=sealed.operand.header, input=blob,
    )  # fmt: skip
    payload = memoryview(bytearray(b"".join(sealed.operand.payload)))
    half = open_engine(name, COMPUTE)
    return memoryview(bytearray(b"".join(half.evaluate(matrix.to(COMPUTE.device), task, payload))))


Decryption = Callable[[RlweOpening, memoryview, int], torch.Tensor]


@pytest.fixture
def integers(monkeypatch: pytest.MonkeyPatch) -> Decryption:
    """Decrypts a whole product to integers, int64 [n, T], before they are scaled; by the reference."""
    monkeypatch.setattr(rlwe, "kernels", TorchKernels)

    def decrypt(opening: RlweOpening, part: memoryview, n: int) -> torch.Tensor:
        degree, dimension = opening.parameters.ring_degree, opening.parameters.dimension
        ends = (0, 2 * n * degree, 2 * n * (degree + dimension), part.nbytes)
        b, high, low = (
            torch.frombuffer(part[start:stop], dtype=dtype).view(n, -1)
            for (start, stop), dtype in zip(
                pairwise(ends), (torch.int16, torch.int16, torch.uint8), strict=True
            )
        )
        product = opening.secret.dot(join_planes(high, low)).reshape(n, -1)
        return ((b.to(torch.int32) << 16) - product)[:, : len(opening.scales)].to(torch.int64)

    return decrypt


def exact_product(matrix: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """W·m in int64: not reduced, so that a wrap would show."""
    return matrix.to(torch.int64) @ values.to(torch.int64)


def noise_bound(matrix: torch.Tensor, parameters: ParameterSet) -> torch.Tensor:
    """The budget: eta·‖W_j‖₁ + switching error, for each row."""
    return parameters.eta * matrix.to(torch.int64).abs().sum(1) + switching_error_bound(parameters)


def random_matrix(n: int, k: int) -> torch.Tensor:
    return torch.randint(-127, 128, (n, k), dtype=torch.int8)


@pytest.mark.parametrize("tokens", [1, 7, 256, 257, 512, 513, 1024, 2048])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 5), (65, 33)])
def test_decrypted_products_are_within_the_budget(tokens: int, n: int, k: int, integers: Decryption) -> None:
    matrix, x = random_matrix(n, k), torch.randn(tokens, k) * torch.rand(tokens, 1).mul(20).exp()
    bound = max(max_l1(matrix)[0], 1)
    parameters = parameters_for(tokens)
    operand = quantize_operand(x, largest_operand(parameters, bound))
    sealed = seal(x, bound)
    part = evaluate(matrix, sealed)
    error = integers(sealed.opening, part, n) - exact_product(matrix, operand.values)
    assert bool((error.abs() <= noise_bound(matrix, parameters)[:, None]).all())

    y = sealed.opening.open([Part((0, n), part)])
    assert (y.dtype, y.shape) == (torch.float32, (tokens, n))
    rounding = 0.5 * matrix.to(torch.float64).abs().sum(1)
    tolerance = (noise_bound(matrix, parameters) + rounding + 2**31 * 1e-6) * operand.scales[:, None].double()
    assert bool(((y.double() - x.double() @ matrix.double().t()).abs() <= tolerance).all())


@pytest.mark.parametrize("parameters", REAL, ids=lambda p: p.name)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_operand_does_not_wrap(parameters: ParameterSet, sign: int, integers: Decryption) -> None:
    """Every entry ±x_max with the signs of the row of maximal ‖W_j‖₁: the product touches the bound."""
    matrix = random_matrix(17, 96)
    matrix[3] = torch.where(matrix[3] < 0, -127, 127)
    bound = max_l1(matrix)[0]
    x_max = largest_operand(parameters, bound)
    x = (sign * x_max * matrix[3].sign().to(torch.float32)).repeat(parameters.ring_degree, 1)
    sealed = seal(x, bound)
    decrypted = integers(sealed.opening, evaluate(matrix, sealed), 17)
    exact = exact_product(matrix, x.t())
    assert int(exact[3].abs().min()) > 0.99 * 2**31
    assert bool(((decrypted - exact).abs() <= noise_bound(matrix, parameters)[:, None]).all())


@pytest.mark.parametrize("tokens", [1, 200, 513])
def test_results_of_row_ranges_join(tokens: int) -> None:
    matrix, x = random_matrix(40, 24), torch.randn(tokens, 24)
    sealed = seal(x, max_l1(matrix)[0])
    rows = [(0, 13), (13, 14), (14, 40)]
    whole = sealed.opening.open([Part((0, 40), evaluate(matrix, sealed))])
    shards = sealed.opening.open([Part((a, b), evaluate(matrix[a:b], sealed)) for a, b in rows])
    assert torch.equal(whole, shards)


def test_clear_computes_the_same_without_noise() -> None:
    matrix, x = random_matrix(9, 31), torch.randn(20, 31)
    bound = max_l1(matrix)[0]
    operand = quantize_operand(x, largest_operand(parameters_for(20), bound))
    sealed = clear.seal(x, bound)
    y = sealed.opening.open([Part((0, 9), evaluate(matrix, sealed, "clear"))])
    expected = exact_product(matrix, operand.values).t().to(torch.float32) * operand.scales[:, None]
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("tokens", "k", "extreme"), [(2048, 96, False), (256, 4096, True), (1024, 700, True), (300, 512, False)]
)
def test_noise_has_the_predicted_size(tokens: int, k: int, extreme: bool, integers: Decryption) -> None:
    """Measured against predicted standard deviation, as a whole and without the part of rounding b'."""
    n = 24
    matrix = random_matrix(n, k)
    if extreme:
        matrix = torch.where(matrix < 0, -127, 127).to(torch.int8)
    parameters = parameters_for(tokens)
    bound = max_l1(matrix)[0]
    x = torch.randn(tokens, k)
    sealed = seal(x, bound)
    exact = exact_product(matrix, quantize_operand(x, largest_operand(parameters, bound)).values)
    error = (integers(sealed.opening, evaluate(matrix, sealed), n) - exact).double()
    predicted = predicted_noise_std(matrix.double().norm(dim=1), parameters)[:, None]
    assert float((error / predicted).std()) == pytest.approx(1, rel=0.05)
    assert abs(float((error / predicted).mean())) < 8 / math.sqrt(error.numel())

    b = torch.frombuffer(bytearray(sealed.operand.payload[0]), dtype=torch.int32).view(k, -1)
    unrounded = reference(matrix, b)[:, :tokens].to(torch.int64)
    step = 1 << (32 - SWITCHED_B_BITS)
    rounding = (unrounded + step // 2) // step * step - unrounded
    rest = (predicted.square() - step**2 / 12).sqrt()
    assert float(((error - rounding) / rest).std()) == pytest.approx(1, rel=0.05)


def test_noise_of_switching_alone_has_the_predicted_size(integers: Decryption) -> None:
    """W = 1: what is left besides rounding b' is rounding a', times s."""
    matrix = torch.eye(32, dtype=torch.int8)
    sealed = seal(torch.zeros(2048, 32), 1)
    error = integers(sealed.opening, evaluate(matrix, sealed), 32).double()
    b = torch.frombuffer(bytearray(sealed.operand.payload[0]), dtype=torch.int32).view(32, -1).to(torch.int64)
    rest = error - ((b + 2**15) // 2**16 * 2**16 - b)
    predicted = (predicted_noise_std(torch.ones(1), REAL[-1]).square() - 2**32 / 12).sqrt()
    assert float(rest.std()) == pytest.approx(float(predicted), rel=0.05)


def excess_of_high_bytes(values: torch.Tensor) -> float:
    """(χ² − dof)/√(2·dof) of the top bytes against the uniform distribution."""
    observed = torch.bincount((values.flatten().to(torch.int64) >> 24) + 128, minlength=256).double()
    expected = observed.sum() / 256
    return float((((observed - expected) ** 2 / expected).sum() - 255) / math.sqrt(2 * 255))


def test_a_wrong_secret_opens_nothing(integers: Decryption) -> None:
    n = k = 96
    matrix, x = random_matrix(n, k), torch.randn(2048, k)
    mine, other = seal(x, max_l1(matrix)[0]), seal(x, max_l1(matrix)[0])
    part = evaluate(matrix, mine)
    wrong = RlweOpening(mine.opening.parameters, other.opening.secret, mine.opening.scales)
    assert abs(excess_of_high_bytes(integers(wrong, part, n))) < 8
    assert excess_of_high_bytes(integers(mine.opening, part, n)) > 1000


def test_ciphertexts_look_uniform_and_share_nothing() -> None:
    x = torch.randn(512, 64)
    one, other = seal(x, 5000), seal(x, 5000)
    first, second = (
        torch.frombuffer(bytearray(s.operand.payload[0]), dtype=torch.int32) for s in (one, other)
    )
    assert one.operand.header["mask_seed"] != other.operand.header["mask_seed"]
    assert one.operand.header["parameters"] == other.operand.header["parameters"] == "rlwe-512x4"
    # Two independent uniform words agree once in 2^32.
    assert int((first == second).sum()) <= 2
    for words in (first, second, first - second):
        assert abs(excess_of_high_bytes(words)) < 8
    # With the masks taken away nothing changes: they are another key's than the secret's.
    masks = expand_mask(PublicSeed.from_hex(one.operand.header["mask_seed"]), 64, 2048)
    for i in range(4):
        assert abs(excess_of_high_bytes(first.view(64, 512) - masks[:, 512 * i : 512 * (i + 1)])) < 8


def test_headers_say_nothing_of_the_values() -> None:
    """Same size, other values: the same header but for the seed, and a payload of the same length."""
    small, large = seal(torch.full((5, 8), 1e-6), 900), seal(torch.full((3, 8), 1e6), 900)
    assert small.operand.header.keys() == large.operand.header.keys() == {"parameters", "mask_seed"}
    assert small.operand.header["parameters"] == large.operand.header["parameters"]
    assert (
        [p.nbytes for p in small.operand.payload]
        == [p.nbytes for p in large.operand.payload]
        == [4 * 8 * 256]
    )


def test_representations_show_no_secret() -> None:
    sealed = seal(torch.randn(3, 4), 500)
    for shown in (sealed, sealed.opening, sealed.opening.secret):
        for text in (repr(shown), str(shown), f"{shown}"):
            assert "tensor" not in text
            assert "array" not in text
            assert len(text) < 120


def test_secrets_can_neither_be_pickled_nor_copied() -> None:
    sealed = seal(torch.randn(3, 4), 500)
    for holder in (sealed.opening, sealed.opening.secret):
        for leak in (pickle.dumps, copy.copy, copy.deepcopy):
            if holder is sealed.opening and leak is copy.copy:
                continue  # a second reference to the same secret in the same memory
            with pytest.raises(TypeError):
                leak(holder)


@pytest.mark.parametrize("change", [-1, 1, -8, 4096])
@pytest.mark.parametrize("name", ["rlwe", "clear"])
def test_results_of_another_length_are_refused(name: str, change: int) -> None:
    matrix, x = random_matrix(4, 6), torch.randn(10, 6)
    sealed = (seal if name == "rlwe" else clear.seal)(x, max_l1(matrix)[0])
    part = evaluate(matrix, sealed, name).tobytes()
    wrong = part[:change] if change < 0 else part + bytes(change)
    with pytest.raises(WireError, match="4 rows"):
        sealed.opening.open([Part((0, 4), memoryview(wrong))])
    with pytest.raises(WireError, match="4 rows"):
        sealed.opening.check(Part((0, 4), memoryview(wrong)))
    with pytest.raises(WireError):
        sealed.opening.open([Part((0, 4), memoryview(b""))])


@pytest.mark.parametrize("engine_seal", [seal, clear.seal])
def test_operands_that_cannot_be_sealed_are_refused(engine_seal: type[seal]) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.ones(4, 8)
        x[2, 5] = bad
        with pytest.raises(NotFinite, match="finite") as error:
            engine_seal(x, 500)
        assert error.value.hint
    for tokens in (0, 2049):
        with pytest.raises(ParameterError, match=f"{tokens} tokens"):
            engine_seal(torch.ones(tokens, 8), 500)
    with pytest.raises(ParameterError, match="levels"):
        engine_seal(torch.ones(4, 8), 2**24)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_floating_type_is_sealed(dtype: torch.dtype) -> None:
    matrix = torch.eye(8, dtype=torch.int8) * 127
    x = torch.randn(12, 16).to(dtype)[:, ::2].requires_grad_()
    sealed = seal(x, 127)
    y = sealed.opening.open([Part((0, 8), evaluate(matrix, sealed))])
    expected = 127 * x.detach().double()
    assert torch.allclose(y.double(), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


def test_tokens_of_zeros_and_denormals_come_back_small() -> None:
    x = torch.zeros(3, 8)
    x[1] = 1e-42
    x[2] = 1e30
    matrix = torch.ones(5, 8, dtype=torch.int8)
    sealed = seal(x, 8)
    y = sealed.opening.open([Part((0, 5), evaluate(matrix, sealed))])
    assert float(y[:2].abs().max()) < 1e-28
    assert torch.allclose(y[2], torch.tensor(8e30), rtol=1e-2)
