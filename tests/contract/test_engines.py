"""What every engine promises, whatever it is made of."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from hetrain.public.errors import HetrainError, NotFinite, ParameterError, WireError
from hetrain.public.protocol.messages import Direction
from hetrain.secret.engine import ENGINES
from tests.harness.engine import GUARANTEES, EngineHarness, open_checked
from worker_gpu.engines import ENGINES as WORKER_ENGINES

SHAPES = {"one": (1, 1), "wide": (3, 70), "tall": (45, 2), "square": (16, 16), "ragged": (37, 29)}
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
BOTH = pytest.mark.parametrize("direction", DIRECTIONS)


@pytest.fixture(scope="module", params=[*ENGINES, "rlwe with hints"])
def harness(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EngineHarness:
    generator = torch.Generator().manual_seed(11)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    weights["extreme"] = torch.where(torch.rand(20, 24, generator=generator) < 0.5, -1.0, 1.0)
    weights["holes"] = torch.randn(9, 11, generator=generator)
    weights["holes"][[0, 4]] = 0
    weights["holes"][:, [3, 10]] = 0
    name, _, hints = request.param.partition(" with ")
    return EngineHarness(name, weights, tmp_path_factory.mktemp(name) / "model", hints=bool(hints))


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
    y = harness.multiply("ragged", direction, x, [(0, 3), (3, 4), (4, n)])
    assert not harness.excess("ragged", direction, x, y).any()


def test_another_jobs_keys_open_nothing(harness: EngineHarness) -> None:
    """Numbers far off everywhere, or a refusal. Without encryption everyone's opening fits."""
    x = torch.randn(33, width(harness, "ragged", "forward"))
    mine = harness.seal("ragged", "forward", x)
    other = harness.new_sealer().seal(x, harness.product("ragged", "forward"))
    answer = harness.answer("ragged", "forward", mine)
    right = open_checked(mine, answer)
    if not ENGINES[harness.name].hides:
        assert torch.equal(open_checked(other, answer), right)
        return
    with suppress(WireError):
        far = (open_checked(other, answer) - right).abs() > 0.01 * right.abs().max()
        assert float(far.float().mean()) > 0.8


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
    with pytest.raises(WireError, match="37 rows"):
        sealed.opening.check(resized_part)
    with pytest.raises(WireError, match="37 rows"):
        sealed.opening.open([resized_part])


def resized(data: bytes, change: str) -> bytes:
    """`data` with another length."""
    return {
        "empty": b"",
        "cut": data[:7],
        "shorter": data[:-1],
        "longer": data + b"\0",
        "doubled": data + data[:-3],
    }[change]


def test_corrupted_blobs_change_results_or_are_refused(harness: EngineHarness) -> None:
    """Whatever bytes arrive: an error of ours or a wrong number, in the worker as in the client."""
    generator = random.Random(5)
    x = torch.randn(3, 16)
    sealed = harness.seal("square", "forward", x)
    payload = b"".join(sealed.operand.payload)
    (part,) = harness.answer("square", "forward", sealed)
    for position in {0, 1, 8, 17, 40, *(generator.randrange(len(payload)) for _ in range(8))}:
        with suppress(WireError):
            (answer,) = harness.answer("square", "forward", sealed, payload=flipped(payload, position))
            assert open_checked(sealed, [answer]).shape == (3, 16)
    for position in {0, 1, 8, 17, 40, *(generator.randrange(part.data.nbytes) for _ in range(8))}:
        with suppress(WireError):
            y = open_checked(sealed, [replace(part, data=memoryview(flipped(bytes(part.data), position)))])
            assert y.shape == (3, 16)


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
        for part in harness.answer("ragged", "forward", sealed, [(0, 20), (20, 37)]):
            assert part.data.nbytes == part.n * sealed.operand.result_row_bytes


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
    noise = GUARANTEES[harness.name].error(5, harness.matrix("square", "forward")).max() * scales
    assert bool(((y - expected).abs() <= noise + 1e-3 * expected.abs().max()).all())
