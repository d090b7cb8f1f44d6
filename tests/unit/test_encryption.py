"""Encryption is exact ring arithmetic plus noise of the size that was promised."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from hetrain.public.errors import ParameterError, ResultRejected, WireError
from hetrain.public.lattice.bounds import OperandBound, operand_bound
from hetrain.public.lattice.parameters import ETA, PARAMETER_SETS, SLOTS, ParameterSet, parameters_for
from hetrain.public.lattice.ring import DROPPED_BITS, MODULUS, RESULT_BITS
from hetrain.public.lattice.uniform_masks import expand_masks
from hetrain.public.model.quantization import norms_of
from hetrain.secret.activation_quantization import quantize_operand
from hetrain.secret.engines.rlwe import seal as rlwe
from hetrain.secret.engines.rlwe.seal import RlweOpening
from hetrain.secret.engines.rlwe.torch_ring import TorchRing
from tests.harness import plain_ring
from tests.harness.engine import EngineHarness, open_checked

EVERY_SET = pytest.mark.parametrize("parameters", PARAMETER_SETS.values(), ids=lambda p: p.name)
N_ROWS, K = 40, 96
BEYOND = {"ones": torch.ones(5, 8), "identity": torch.eye(16), "wide": torch.randn(24, 4096)}


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> EngineHarness:
    generator = torch.Generator().manual_seed(5)
    weights: Mapping[str, torch.Tensor] = {"m": torch.randn(N_ROWS, K, generator=generator), **BEYOND}
    return EngineHarness("rlwe", weights, tmp_path_factory.mktemp("rlwe") / "model")


def bound_of(matrix: torch.Tensor) -> OperandBound:
    """That of products with `matrix`."""
    return operand_bound(norms_of(matrix)[0], len(matrix))


def c_of(payload: memoryview, parameters: ParameterSet, k: int) -> torch.Tensor:
    """c, int64 [N, K], from the digits that travel."""
    planes = torch.frombuffer(bytearray(payload), dtype=torch.int8).to(torch.int64)
    low, middle, high = planes.view(3, parameters.ring_degree, k)
    return low + (middle << 8) + (high << 16)


def signed(values: torch.Tensor) -> torch.Tensor:
    """Representatives modulo q in −(q−1)/2..(q−1)/2."""
    return (values + MODULUS // 2) % MODULUS - MODULUS // 2


@EVERY_SET
def test_ciphertexts_are_mask_times_secret_plus_noise_plus_message(
    parameters: ParameterSet, harness: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2^6·c − a·s − m in plain integers is noise within ±8 and a rounding within ±32, everywhere."""
    monkeypatch.setattr(rlwe, "ring_kernels", TorchRing)  # whose secret can be asked
    tokens = parameters.ring_degree - 3
    x = torch.randn(tokens, K)
    sealed = harness.seal("m", "forward", x)
    assert sealed.operand.header == {"parameters": parameters.name, "operand": "ciphertext"}
    c = c_of(sealed.operand.payload[0], parameters, K)
    opening = sealed.opening
    assert isinstance(opening, RlweOpening)
    masks = expand_masks(opening.hint.seed, K)
    products = opening.secret.dot(masks)[:, :K]
    message = quantize_operand(x, bound_of(harness.matrices["m"])).values
    error = (c << DROPPED_BITS) - products
    error[:tokens] -= message
    error = signed(error).to(torch.float64)
    assert float(error.abs().max()) <= ETA + 32
    spread = math.sqrt(ETA / 2 + 64**2 / 12)
    assert float(error.std()) == pytest.approx(spread, rel=8 / math.sqrt(2 * error.numel()))
    # One column once more, by the definitions: the secret from its spectrum, the product by schoolbook.
    if parameters.ring_degree == 256:
        secret = [plain_ring.inverse(points) for points in opening.secret.points[:, :, 0].tolist()]
        centred = [[v if v < 2 else v - MODULUS for v in polynomial] for polynomial in secret]
        assert {v for polynomial in centred for v in polynomial} == {-1, 0, 1}
        assert products[:, 5].tolist() == plain_ring.masked(masks[0, :, 5].tolist(), centred)


@pytest.mark.parametrize("tokens", [1, 7, 256, 257, 1024, 2048])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_decrypted_products_are_within_the_budget(
    tokens: int, direction: str, harness: EngineHarness
) -> None:
    k = K if direction == "forward" else N_ROWS
    x = torch.randn(tokens, k) * torch.rand(tokens, 1).mul(20).exp()
    y = harness.multiply("m", direction, x)  # type: ignore[arg-type]
    assert (y.dtype, y.shape) == (torch.float32, (tokens, K + N_ROWS - k))
    assert not harness.excess("m", direction, x, y).any()  # type: ignore[arg-type]


@EVERY_SET
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_operand_does_not_wrap(
    parameters: ParameterSet, sign: int, harness: EngineHarness
) -> None:
    """Tokens with the signs of the row of maximal ‖W_j‖₁, which come closest to q/2."""
    w = harness.matrices["m"].to(torch.float32)
    row = w[w.abs().sum(1).argmax()]
    x = (sign * row.sign()).repeat(parameters.ring_degree, 1)
    operand = quantize_operand(x, bound_of(harness.matrices["m"]))
    reach = (operand.values[0].to(torch.float64) * row.to(torch.float64)).sum().abs()
    assert float(reach) > 0.95 * MODULUS / 2
    assert not harness.excess("m", "forward", x, harness.multiply("m", "forward", x)).any()


@pytest.mark.parametrize(("name", "tokens"), [("m", 2048), ("wide", 256), ("wide", 1024)])
def test_noise_has_the_predicted_size(name: str, tokens: int, harness: EngineHarness) -> None:
    """σ² = (eta/2 + 2^12/12)·‖W_j‖₂² + (q/2^14)²/12: noise and rounding up, rounding down."""
    w = harness.matrices[name].to(torch.float64)
    x = torch.randn(tokens, w.shape[1])
    operand = quantize_operand(x, bound_of(harness.matrices[name]))
    exact = operand.values.to(torch.float64) @ w.t()
    y = harness.multiply(name, "forward", x).to(torch.float64) / operand.scales[:, None]
    predicted = (
        (ETA / 2 + 4.0**DROPPED_BITS / 12) * w.square().sum(1) + (MODULUS / 2**RESULT_BITS) ** 2 / 12
    ).sqrt()
    ratio = (y - exact) / predicted
    assert float(ratio.std()) == pytest.approx(1, rel=0.05)
    assert abs(float(ratio.mean())) < 8 / math.sqrt(ratio.numel())


def excess_of_high_bits(residues: torch.Tensor, modulus: int) -> float:
    """(χ² − dof)/√(2·dof) of 256 equal classes against the uniform distribution."""
    classes = (residues.flatten().to(torch.float64) * 256 / modulus).to(torch.int64)
    observed = torch.bincount(classes, minlength=256).to(torch.float64)
    expected = observed.sum() / 256
    return float((((observed - expected) ** 2 / expected).sum() - 255) / math.sqrt(2 * 255))


def test_a_wrong_secret_opens_nothing(harness: EngineHarness) -> None:
    x = torch.randn(SLOTS, K)
    mine, other = (harness.seal("m", "forward", x) for _ in range(2))
    assert isinstance(mine.opening, RlweOpening)
    assert isinstance(other.opening, RlweOpening)
    right = open_checked(mine, harness.answer("m", "forward", mine))
    wrong = RlweOpening(mine.opening.parts, mine.opening.hint, other.opening.secret, mine.opening.scales)
    for y, is_uniform in ((wrong.open(), True), (right, False)):
        integers = (y / mine.opening.scales.tokens[:, None]).to(torch.float64) % MODULUS
        assert (abs(excess_of_high_bits(integers, MODULUS)) < 8) == is_uniform


def test_ciphertexts_look_uniform_and_share_nothing(harness: EngineHarness) -> None:
    x = torch.zeros(512, K)
    parameters = parameters_for(512)
    first, second = (
        c_of(harness.seal("m", "forward", x).operand.payload[0], parameters, K) for _ in range(2)
    )
    # Two independent values of 2^24 agree once in 2^24.
    assert int((first == second).sum()) <= 2
    for values in (first, second, first - second):
        assert abs(excess_of_high_bits((values << DROPPED_BITS) % MODULUS, MODULUS)) < 8


def test_headers_say_nothing_of_the_values(harness: EngineHarness) -> None:
    small, large = (harness.seal("m", "forward", torch.full((5, K), size)) for size in (1e-6, 1e6))
    assert small.operand.header == large.operand.header
    assert [p.nbytes for p in small.operand.payload] == [p.nbytes for p in large.operand.payload]
    assert small.operand.nbytes == 3 * K * 256


def test_representations_show_no_secret(harness: EngineHarness) -> None:
    sealed = harness.seal("m", "forward", torch.randn(3, K))
    assert isinstance(sealed.opening, RlweOpening)
    for shown in (sealed, sealed.opening, sealed.opening.secret, harness.verification.kept["m", "forward"]):
        for text in (repr(shown), str(shown), f"{shown}"):
            assert "tensor" not in text
            assert "array" not in text
            assert len(text) < 120


def test_secrets_can_neither_be_pickled_nor_copied(harness: EngineHarness) -> None:
    sealed = harness.seal("m", "forward", torch.randn(3, K))
    assert isinstance(sealed.opening, RlweOpening)
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            leak(sealed.opening.secret)
    for leak in (pickle.dumps, copy.deepcopy):
        with pytest.raises((TypeError, AttributeError)):
            leak(sealed.opening)


def test_nothing_is_decrypted_before_it_was_verified(
    harness: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watched(TorchRing):
        opened = 0

        def decrypt(self, *arguments: object) -> None:
            Watched.opened += 1
            super().decrypt(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(rlwe, "ring_kernels", Watched)
    sealed = harness.seal("m", "forward", torch.randn(3, K))
    (part,) = harness.answer("m", "forward", sealed)
    with pytest.raises(WireError, match="not complete"):
        sealed.opening.open()
    wrong = bytearray(part.data)
    wrong[3] ^= 0x40
    with pytest.raises(ResultRejected):
        sealed.opening.check(type(part)(part.rows, memoryview(wrong), part.worker))
    with pytest.raises(WireError, match="not complete"):
        sealed.opening.open()
    assert Watched.opened == 0
    assert open_checked(sealed, [part]).shape == (3, N_ROWS)
    assert Watched.opened > 0


def test_a_matrix_that_leaves_no_room_is_refused(tmp_path: Path) -> None:
    huge = torch.ones(2, 26_000)
    with pytest.raises(ParameterError, match="levels"):
        operand_bound(norms_of((huge * 127).to(torch.int8))[0], len(huge))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_floating_type_is_sealed(dtype: torch.dtype, harness: EngineHarness) -> None:
    x = torch.randn(12, 32).to(dtype)[:, ::2].requires_grad_()
    y = harness.multiply("identity", "forward", x)
    expected = 127 * x.detach().double()
    assert torch.allclose(y.double(), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


def test_tokens_of_zeros_and_denormals_come_back_small(harness: EngineHarness) -> None:
    x = torch.zeros(3, 8)
    x[1] = 1e-42
    x[2] = 1e30
    y = harness.multiply("ones", "forward", x)
    assert float(y[:2].abs().max()) < 1e-28
    assert torch.allclose(y[2], torch.tensor(8 * 127e30), rtol=1e-2)
