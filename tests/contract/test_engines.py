"""What every engine promises, whatever it is made of."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from hetrain.public.errors import HetrainError, NotFinite, ParameterError, ResultRejected, WireError
from hetrain.public.lattice.bounds import accepted_error
from hetrain.public.model.quantization import Scales
from hetrain.public.protocol.messages import Direction
from hetrain.secret.engine import ENGINES
from tests.harness.engine import GUARANTEES, EngineHarness, open_checked
from worker_gpu.engines import ENGINES as WORKER_ENGINES

SHAPES = {"one": (1, 1), "wide": (3, 70), "tall": (45, 2), "square": (16, 16), "ragged": (137, 29)}
RANGES = {137: [(0, 64), (64, 128), (128, 137)], 29: [(0, 29)]}
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
BOTH = pytest.mark.parametrize("direction", DIRECTIONS)


@pytest.fixture(scope="module", params=[*ENGINES])
def harness(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EngineHarness:
    generator = torch.Generator().manual_seed(11)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    weights["extreme"] = torch.where(torch.rand(20, 24, generator=generator) < 0.5, -1.0, 1.0)
    weights["holes"] = torch.randn(9, 11, generator=generator)
    weights["holes"][[0, 4]] = 0
    weights["holes"][:, [3, 10]] = 0
    return EngineHarness(request.param, weights, tmp_path_factory.mktemp(request.param) / "model")


def random_operand(tokens: int, k: int) -> torch.Tensor:
    """Tokens of very different sizes."""
    return torch.randn(tokens, k) * torch.logspace(-6, 6, tokens)[:, None]


def width(harness: EngineHarness, name: str, direction: Direction) -> int:
    return harness.matrix(name, direction).shape[1]


def test_both_sides_have_the_same_engines() -> None:
    assert set(ENGINES) == set(WORKER_ENGINES) == set(GUARANTEES)


@BOTH
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_products_keep_the_promise(
    harness: EngineHarness, direction: Direction, name: str, tokens: int
) -> None:
    x = random_operand(tokens, width(harness, name, direction))
    y = harness.multiply(name, direction, x)
    assert (y.dtype, y.shape) == (torch.float32, (tokens, len(harness.matrix(name, direction))))
    assert not harness.excess(name, direction, x, y).any()


@BOTH
def test_extremes_of_the_range(harness: EngineHarness, direction: Direction) -> None:
    """Operands that touch the bound in every entry, with the signs that add up most."""
    w = harness.matrix("extreme", direction)
    assert set(w.flatten().tolist()) == {-127, 127}
    aligned = w[[0, 1, 2]].sign().to(torch.float32)
    x = torch.cat([aligned, -aligned, torch.ones(1, w.shape[1]), -torch.ones(1, w.shape[1])])
    assert not harness.excess("extreme", direction, x, harness.multiply("extreme", direction, x)).any()


@BOTH
def test_channels_and_tokens_of_zeros(harness: EngineHarness, direction: Direction) -> None:
    x = random_operand(6, width(harness, "holes", direction))
    x[[0, 3]] = 0
    y = harness.multiply("holes", direction, x)
    assert not harness.excess("holes", direction, x, y).any()
    assert float(y[[0, 3]].abs().max()) < 1e-25


@BOTH
def test_ranges_of_rows_join(harness: EngineHarness, direction: Direction) -> None:
    n = len(harness.matrix("ragged", direction))
    x = random_operand(7, width(harness, "ragged", direction))
    y = harness.multiply("ragged", direction, x, RANGES[n])
    assert not harness.excess("ragged", direction, x, y).any()


@BOTH
def test_channels_scale_operand_and_result(harness: EngineHarness, direction: Direction) -> None:
    product = harness.product("ragged", direction)
    x, inputs, outputs = torch.randn(9, product.k), torch.rand(product.k) + 0.5, torch.rand(product.n) + 0.5
    sealed = harness.sealer.seal(x, product, Scales(outputs, inputs))
    y = open_checked(sealed, harness.answer("ragged", direction, sealed)) / outputs
    assert not harness.excess("ragged", direction, x * inputs, y).any()


def test_another_operands_results_are_refused(harness: EngineHarness) -> None:
    """Also those of the same values: without encryption they are the same."""
    x = torch.randn(33, width(harness, "ragged", "forward"))
    mine, other = harness.seal("ragged", "forward", x), harness.new_sealer()
    answer = harness.answer("ragged", "forward", mine)
    again = other.seal(x, harness.product("ragged", "forward"))
    if ENGINES[harness.name].hides:
        with pytest.raises(ResultRejected):
            open_checked(again, answer)
    else:
        assert torch.equal(open_checked(again, answer), open_checked(mine, answer))
    with pytest.raises(ResultRejected):
        open_checked(other.seal(x + 1, harness.product("ragged", "forward")), answer)


@pytest.mark.parametrize("change", ["empty", "cut", "shorter", "longer", "doubled"])
def test_operands_of_another_length_are_refused(harness: EngineHarness, change: str) -> None:
    sealed = harness.seal("ragged", "forward", torch.randn(5, 29))
    payload = b"".join(sealed.operand.payload)
    with pytest.raises(WireError) as error:
        harness.answer("ragged", "forward", sealed, payload=resized(payload, change))
    assert str(len(resized(payload, change))) in str(error.value)


@pytest.mark.parametrize("change", ["empty", "cut", "shorter", "longer", "doubled"])
def test_results_of_another_length_are_refused(harness: EngineHarness, change: str) -> None:
    sealed = harness.seal("ragged", "forward", torch.randn(5, 29))
    (part,) = harness.answer("ragged", "forward", sealed)
    resized_part = replace(part, data=memoryview(bytearray(resized(bytes(part.data), change))))
    with pytest.raises(ResultRejected, match="length") as error:
        sealed.opening.check(resized_part)
    assert error.value.workers == ("worker",)
    with pytest.raises(WireError, match="not complete"):
        sealed.opening.open()


def resized(data: bytes, change: str) -> bytes:
    """`data` with another length."""
    return {
        "empty": b"",
        "cut": data[:7],
        "shorter": data[:-1],
        "longer": data + b"\0",
        "doubled": data + data[:-3],
    }[change]


def test_corrupted_blobs_are_refused(harness: EngineHarness) -> None:
    """Whatever bytes arrive: an error of the worker's, or a result that is not opened."""
    generator = random.Random(5)
    x = torch.randn(3, 16)
    sealed = harness.seal("square", "forward", x)
    payload = b"".join(sealed.operand.payload)
    (part,) = harness.answer("square", "forward", sealed)
    allowed = accepted_error(16) if harness.name == "rlwe" else 0.0  # what verification tolerates
    for position in {0, 1, 8, 17, 40, *(generator.randrange(len(payload)) for _ in range(8))}:
        with suppress(WireError, ResultRejected):
            answer = harness.answer("square", "forward", sealed, payload=flipped(payload, position))
            y = open_checked(sealed, answer)  # what fills a tile up changes nothing
            assert float(harness.excess("square", "forward", x, y).max()) <= allowed
    for position in {0, 1, 8, 9, *(generator.randrange(16) for _ in range(8))}:
        changed = memoryview(flipped(bytes(part.data), position))
        with suppress(ResultRejected):
            y = open_checked(sealed, [replace(part, data=changed)])
            assert harness.name == "concrete", "only there bits below the noise change nothing"
            assert not harness.excess("square", "forward", x, y).any()
    assert open_checked(sealed, [part]).shape == (3, 16)


def flipped(data: bytes, position: int) -> bytearray:
    changed = bytearray(data)
    changed[position] ^= 0xFF
    return changed


def test_headers_are_checked(harness: EngineHarness) -> None:
    sealed = harness.seal("square", "forward", torch.randn(3, 16))
    for key, value in sealed.operand.header.items():
        for wrong in ("", "nothing of the kind", -1, 1 << 40):
            with pytest.raises(HetrainError) as error:
                harness.answer("square", "forward", sealed, header={**sealed.operand.header, key: wrong})
            assert type(error.value).__name__ in ("WireError", "WorkerRefused"), (key, value, wrong)
        missing = {k: v for k, v in sealed.operand.header.items() if k != key}
        with pytest.raises(HetrainError):
            harness.answer("square", "forward", sealed, header=missing)
    with pytest.raises(WireError, match="unheard_of"):
        harness.answer("square", "forward", sealed, header={**sealed.operand.header, "unheard_of": 1})


def test_results_have_the_announced_size(harness: EngineHarness) -> None:
    for tokens in (1, 5, 300):
        sealed = harness.seal("ragged", "forward", torch.randn(tokens, 29))
        for rows in ([(0, 137)], RANGES[137]):
            parts = harness.answer("ragged", "forward", sealed, rows)
            assert sum(part.data.nbytes for part in parts) == sealed.operand.result_bytes


def test_a_micro_batch_has_keys_of_its_own_where_keys_serve_several_operands(
    harness: EngineHarness,
) -> None:
    x = torch.randn(3, 16)
    sealer = harness.sealer.for_micro_batch()
    sealed = sealer.seal(x, harness.product("square", "forward"))
    y = open_checked(sealed, harness.answer("square", "forward", sealed))
    assert not harness.excess("square", "forward", x, y).any()
    assert (sealer is harness.sealer) == (harness.name != "concrete")


def test_many_threads_at_once(harness: EngineHarness) -> None:
    operands = [torch.randn(4, 29) for _ in range(12)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: harness.multiply("ragged", "forward", x), operands))
    for x, y in zip(operands, results, strict=True):
        assert not harness.excess("ragged", "forward", x, y).any()


def test_what_leaves_is_fresh_every_time(harness: EngineHarness) -> None:
    x = torch.randn(5, 16)
    payloads = {b"".join(harness.seal("square", "forward", x).operand.payload) for _ in range(3)}
    assert len(payloads) == (3 if ENGINES[harness.name].hides else 1)


def test_operands_that_cannot_be_sealed_are_refused(harness: EngineHarness) -> None:
    for bad in (float("nan"), float("inf")):
        x = torch.ones(4, 16)
        x[2, 5] = bad
        with pytest.raises(NotFinite, match="finite"):
            harness.seal("square", "forward", x)
    for tokens in (0, 2049):
        with pytest.raises(ParameterError, match=f"{tokens} tokens"):
            harness.seal("square", "forward", torch.ones(tokens, 16))


def test_fewer_bits_are_coarser_but_as_exact(harness: EngineHarness) -> None:
    x = torch.randn(5, 16)
    sealed = harness.new_sealer(bits=4).seal(x, harness.product("square", "forward"))
    y = open_checked(sealed, harness.answer("square", "forward", sealed))
    scales = x.abs().amax(dim=1, keepdim=True) / 7
    coarse = (x / scales).round().clamp(-7, 7) * scales
    expected = coarse @ harness.matrix("square", "forward").to(torch.float32).t()
    noise = GUARANTEES[harness.name].error(harness.matrix("square", "forward")).max() * scales
    assert bool(((y - expected).abs() <= noise + 1e-3 * expected.abs().max()).all())
