"""The exact ring: every version of every kernel gives the numbers of plain Python integers, to the bit."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetrain.public import compiled
from hetrain.public.compiled import INSTRUCTION_SETS
from hetrain.public.errors import ParameterError, UsageError
from hetrain.public.lattice import ring, uniform_masks
from hetrain.public.lattice.masks import PublicSeed
from hetrain.public.lattice.result_format import pack, packed_bytes
from hetrain.public.lattice.ring import LANES, MODULUS
from hetrain.public.lattice.uniform_masks import MaskBlocks, accept, expand_masks
from hetrain.secret.engines.rlwe.native.ring_library import NativeRing
from hetrain.secret.engines.rlwe.ring_kernels import RingKernels, ring_kernels
from hetrain.secret.engines.rlwe.torch_ring import LARGEST_IMAGE, Message, ResultScales, TorchRing
from hetrain.secret.randomness import SecretStream, sample_ternary
from tests.golden import regenerate as golden
from tests.harness import plain_ring as plain
from worker_gpu import epilogue
from worker_gpu.epilogue import Epilogue

SETS = [(16, 2), (256, 8), (512, 4), (1024, 2), (2048, 1)]
NAMES = [f"{n}x{d}" for n, d in SETS]
GOLDEN = Path(golden.__file__).parent
SEED = PublicSeed(golden.SEED)
TORCH = TorchRing()


def compiled_ring(name: str) -> NativeRing:
    """The compiled kernels for one instruction set, where this machine has it."""
    best = NativeRing.best()
    if best is None and shutil.which("cc") is None:
        pytest.skip("there was no C compiler when hetrain was installed")
    assert best is not None, "there is a C compiler: reinstall hetrain (pip install --editable .)"
    if INSTRUCTION_SETS.index(name) > best.level:
        pytest.skip(f"this machine has no {name}")
    return NativeRing(best.found, INSTRUCTION_SETS.index(name))


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def native(request: pytest.FixtureRequest) -> NativeRing:
    return compiled_ring(request.param)


@pytest.fixture(scope="module")
def natives() -> list[NativeRing]:
    """All of them: where computing what is expected takes longer than the kernels do."""
    best = compiled_ring(INSTRUCTION_SETS[0]).best()
    assert best is not None
    return [NativeRing(best.found, level) for level in range(best.level + 1)]


@pytest.fixture(scope="module", params=["torch", *INSTRUCTION_SETS])
def kernels(request: pytest.FixtureRequest) -> RingKernels:
    return TORCH if request.param == "torch" else compiled_ring(request.param)


@pytest.fixture(params=["compiled", "numpy"])
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without the compiled rejection."""
    if request.param == "numpy":
        monkeypatch.setattr(uniform_masks, "_library", lambda: None)
    return str(request.param)


def words(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random words modulo q, among them the extremes."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, MODULUS, shape, generator=generator)
    flat = values.view(-1)
    flat[::7], flat[3::11], flat[5::13] = MODULUS - 1, 0, MODULUS // 2
    return values.to(torch.int32)


def secrets(rank: int, degree: int) -> list[torch.Tensor]:
    """A random secret, and those that add everything up."""
    random = sample_ternary(SecretStream("test"), rank * degree).view(rank, degree)
    return [random, torch.ones_like(random), -torch.ones_like(random), torch.zeros_like(random)]


def keystream(blocks: int, degree: int) -> torch.Tensor:
    """Random noise, the first token of each block at one extreme and the last at the other."""
    pairs = torch.randint(0, 256, (blocks, degree, LANES, 2)).to(torch.uint8)
    pairs[:, 0] = torch.tensor([255, 0], dtype=torch.uint8)
    pairs[:, -1] = torch.tensor([0, 255], dtype=torch.uint8)
    return pairs.view(-1)


def operand(tokens: int, features: int, limit: int) -> Message:
    """Tokens of very different size; halves, on which rounding has to decide; entries beyond the limit."""
    x = torch.randn(tokens, features) * torch.rand(tokens, 1).mul(30).exp()
    inverse = limit / x.abs().amax(dim=1).clamp_min(1e-30)
    for row, factor in ((0, 1.0), (1, -1.0)):
        if row < tokens:
            x[row], inverse[row] = (torch.arange(features) - 7) / 2, factor
    x[-1], inverse[-1] = torch.arange(features) - features / 2, float(limit)
    columns = torch.rand(features) * torch.rand(features).mul(4).exp()
    columns[::3] = 1.0
    return Message(x, columns, inverse, limit)


def plain_message(x: torch.Tensor, limit: int) -> Message:
    """Nothing is scaled."""
    return Message(x, torch.ones(x.shape[1]), torch.ones(len(x)), limit)


def ones(tokens: int, width: int) -> ResultScales:
    """Nothing is scaled."""
    return ResultScales(torch.ones(tokens), torch.ones(width))


# ---- The ring ----


def test_the_modulus_is_a_prime_with_room_for_every_transform() -> None:
    assert MODULUS == plain.Q == 2**30 - 49151
    assert all(MODULUS % divisor for divisor in range(2, 1 << 15))  # (2^15)^2 > q
    assert MODULUS % 4096 == 1


@pytest.mark.parametrize("degree", [n for n, _ in SETS])
def test_the_root_has_order_2n_and_is_the_smallest_generators(degree: int) -> None:
    psi = ring.root_of_unity(degree)
    assert psi == plain.root(degree)
    assert pow(psi, degree, MODULUS) == MODULUS - 1
    assert psi == pow(ring.root_of_unity(2048), 2048 // degree, MODULUS), "one generator serves every degree"


def test_other_degrees_are_refused() -> None:
    for degree in (0, 8, 24, 4096):
        with pytest.raises(ParameterError, match=str(degree)):
            ring.roots(degree)


@pytest.mark.parametrize("degree", [n for n, _ in SETS])
def test_the_transform_is_the_evaluation_at_odd_powers_of_the_root(degree: int) -> None:
    a = words(degree).to(torch.int64)
    assert ring.forward(a[:, None])[:, 0].tolist() == plain.transform(a.tolist())


@pytest.mark.parametrize("degree", [n for n, _ in SETS])
def test_products_point_by_point_are_negacyclic_products(degree: int) -> None:
    a, b = (words(degree, seed=seed).to(torch.int64) for seed in (1, 2))
    spectrum = ring.forward(torch.stack([a, b], dim=1))
    result = ring.inverse((spectrum[:, 0] * spectrum[:, 1] % MODULUS)[:, None])
    assert result[:, 0].tolist() == plain.product(a.tolist(), b.tolist())


def test_the_plain_inverse_undoes_the_plain_transform() -> None:
    a = words(256).tolist()
    assert plain.inverse(plain.transform(a)) == a
    x = [0, 1, *[0] * 14]
    assert plain.product([*[0] * 15, 1], x) == [MODULUS - 1, *[0] * 15], "X^15·X = -1"


# ---- Masks ----


def test_masks_are_those_of_the_definition(version: str) -> None:
    whole = expand_masks(SEED, 33)
    assert whole.shape == (3, 2048, LANES)
    for index in (0, 2):
        assert whole[index].tolist() == plain.mask_block(SEED.value, index)


def test_blocks_can_be_made_in_any_order(version: str) -> None:
    whole = expand_masks(SEED, 80)
    blocks = MaskBlocks(SEED)
    out = torch.empty_like(whole[:2])
    for first in (3, 0, 1, 3):
        blocks.fill(out, first)
        assert torch.equal(out, whole[first : first + 2])


def test_masks_of_other_seeds_differ() -> None:
    other = PublicSeed(bytes(32))
    assert int((expand_masks(SEED, 16) == expand_masks(other, 16)).sum()) < 5


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(0, 700),
    room=st.integers(0, 700),
    rejected=st.sampled_from([0.0, 0.002, 0.1, 0.9, 1.0]),
    seed=st.integers(0, 2**32),
    plainly=st.booleans(),
)
def test_rejection_keeps_exactly_the_words_below_q_in_order(
    size: int, room: int, rejected: float, seed: int, plainly: bool
) -> None:
    random = np.random.default_rng(seed)
    stream = random.integers(0, MODULUS, size, dtype=np.uint32)
    edges = np.array([MODULUS, MODULUS + 1, 2**30 - 1], np.uint32)
    bad = random.random(size) < rejected
    stream[bad] = random.choice(edges, bad.sum())
    stream[~bad & (random.random(size) < 0.1)] = MODULUS - 1
    stream |= random.integers(0, 4, size, dtype=np.uint32) << 30
    expected = [word % 2**30 for word in stream.tolist() if word % 2**30 < MODULUS]
    with pytest.MonkeyPatch.context() as patch:
        if plainly:
            patch.setattr(uniform_masks, "_library", lambda: None)
        out = np.full(room + 1, 7, np.uint32)
        kept = accept(stream, out[:room])
    assert out[:kept].tolist() == expected[:room]
    assert out[room] == 7


# ---- Encryption and decryption ----


def test_the_spectrum_is_the_transform_over_n(native: NativeRing) -> None:
    for degree, rank in SETS:
        for secret in secrets(rank, degree):
            values, companions = native.spectrum(secret).words.astype(np.int64)
            points = ring.forward(secret.to(torch.int64)[:, :, None] % MODULUS).view(-1)
            assert (points * pow(degree, -1, MODULUS) % MODULUS).tolist() == values.tolist()
            assert ((values << 32) // MODULUS).tolist() == companions.tolist()


@pytest.mark.parametrize(("degree", "rank"), SETS, ids=NAMES)
@pytest.mark.parametrize(
    ("features", "missing", "limit"), [(1, 0, 5), (16, 15, 1 << 15), (77, 3, 1 << 24), (128, 0, 1 << 18)]
)
def test_encryption_equals_the_reference(
    natives: list[NativeRing], degree: int, rank: int, features: int, missing: int, limit: int
) -> None:
    blocks = -(-features // LANES)
    masks, noise = words(blocks, rank * degree, LANES), keystream(blocks, degree)
    message = operand(degree - missing, features, limit)
    for secret in secrets(rank, degree)[:2]:
        planes = {
            one.name: torch.full((3, degree, features), 7, dtype=torch.int8) for one in (TORCH, *natives)
        }
        for one in (TORCH, *natives):
            one.encrypt(planes[one.name], 0, masks, noise, message, one.spectrum(secret))
            assert torch.equal(planes[one.name], planes[TORCH.name]), one.name


def test_the_reference_encrypts_as_plain_integers_do() -> None:
    degree, rank, features, limit = 256, 8, 3, 1 << 24
    masks, noise = words(1, rank * degree, LANES), keystream(1, degree)
    message = operand(degree - 1, features, limit)
    x = message.x * message.columns
    planes = torch.empty(3, degree, features, dtype=torch.int8)
    for secret in secrets(rank, degree)[:2]:
        TORCH.encrypt(planes, 0, masks, noise, message, TORCH.spectrum(secret))
        for k in range(features):
            b = plain.masked(masks[0, :, k].tolist(), secret.tolist())
            for t in range(degree):
                b[t] += plain.noise(bytes(noise.view(degree, LANES, 2)[t, k].tolist()))
                if t < degree - 1:
                    b[t] += plain.scaled(float(x[t, k]), float(message.inverse[t]), limit)
            assert [tuple(one) for one in planes[:, :, k].t().tolist()] == [plain.digits(one) for one in b]


def test_what_travels_is_b_within_half_of_what_was_dropped(kernels: RingKernels) -> None:
    """A zero secret and no noise make b the message; residues near every edge of the rounding."""
    degree, features = 2048, 32
    near = torch.arange(-200, 200)
    edges = [centre + near for centre in (0, MODULUS // 2 - (1 << 24) * 31, 64 * 0x7F7F7F % (1 << 24))]
    x = torch.cat(edges).clamp(-(1 << 24), 1 << 24).to(torch.float32).repeat(55)[: degree * features]
    message = plain_message(x.reshape(degree, features), 1 << 24)
    planes = torch.empty(3, degree, features, dtype=torch.int8)
    even = torch.full((64 * degree,), 255, dtype=torch.uint8)  # noise of zero
    spectrum = kernels.spectrum(torch.zeros(1, degree, dtype=torch.int8))
    kernels.encrypt(planes, 0, words(2, degree, LANES), even, message, spectrum)
    digits = planes.to(torch.int64)
    c = digits[0] + 256 * digits[1] + 65536 * digits[2]
    error = (64 * c - message.x.to(torch.int64) + MODULUS // 2) % MODULUS - MODULUS // 2
    assert int(error.min()) == -31
    assert int(error.max()) == 32


def test_the_largest_residue_still_has_three_digits() -> None:
    for b in (MODULUS - 1 - 64 * 0x808080, MODULUS - 33 - 64 * 0x808080, -64 * 0x808080):
        assert abs(64 * plain.value(plain.digits(b)) - b) <= 32


@pytest.mark.parametrize(("degree", "rank"), SETS, ids=NAMES)
@pytest.mark.parametrize(("features", "missing"), [(1, 0), (16, 15), (53, 3), (64, 0)])
def test_decryption_equals_the_reference(
    natives: list[NativeRing], degree: int, rank: int, features: int, missing: int
) -> None:
    tokens = degree - missing
    scales = ResultScales(torch.rand(tokens).mul(40).sub(20).exp(), torch.rand(features + 5))
    hint = words(-(-features // LANES), rank * degree, LANES)
    u = torch.randint(-(1 << 15), 1 << 15, (degree, features)).to(torch.int16)
    u.view(-1)[::5], u.view(-1)[1::5], u.view(-1)[2::5] = 0, -1, -(1 << 15)
    for secret in secrets(rank, degree):
        outs = {one.name: torch.full((tokens, features + 5), 7.0) for one in (TORCH, *natives)}
        for one in (TORCH, *natives):
            one.decrypt(outs[one.name], 2, u, 0, hint, scales, one.spectrum(secret))
            assert torch.equal(outs[one.name], outs[TORCH.name]), one.name
            assert bool((outs[one.name][:, :2] == 7).all() and (outs[one.name][:, features + 2 :] == 7).all())


def test_every_result_is_opened_as_plain_integers_are(kernels: RingKernels) -> None:
    """Every residue and each of its representatives, with masks that reach every part of the modulus."""
    u = torch.arange(1 << 16).to(torch.int16).view(2048, 32)
    for secret in (torch.zeros(1, 2048, dtype=torch.int8), secrets(1, 2048)[0]):
        hint = words(2, 2048, LANES)
        a = TORCH.spectrum(secret).dot(hint)
        expected = [
            [plain.opened(value % plain.LEVELS, mask) for value, mask in zip(*rows, strict=True)]
            for rows in zip(u.tolist(), a.tolist(), strict=True)
        ]
        y = torch.empty(2048, 32)
        kernels.decrypt(y, 0, u, 0, hint, ones(2048, 32), kernels.spectrum(secret))
        assert torch.equal(y, torch.tensor(expected).to(torch.float32))


def test_a_matrix_can_be_done_in_pieces(native: NativeRing) -> None:
    degree, rank, features = 256, 8, 150
    blocks = -(-features // LANES)
    masks, noise = words(blocks, rank * degree, LANES), keystream(blocks, degree)
    message, scales = operand(250, features, 1000), ResultScales(torch.rand(250), torch.rand(features))
    u = torch.randint(-(1 << 15), 1 << 15, (degree, features)).to(torch.int16)
    spectrum = native.spectrum(secrets(rank, degree)[0])
    planes = [torch.zeros(3, degree, features, dtype=torch.int8) for _ in range(2)]
    y = [torch.zeros(250, features) for _ in range(2)]
    native.encrypt(planes[0], 0, masks, noise, message, spectrum)
    native.decrypt(y[0], 0, u, 0, masks, scales, spectrum)
    for first, last in ((0, 1), (1, 6), (6, 10)):
        some = noise.view(blocks, -1)[first:last].reshape(-1)
        native.encrypt(planes[1], LANES * first, masks[first:last], some, message, spectrum)
        native.decrypt(y[1], LANES * first, u, LANES * first, masks[first:last], scales, spectrum)
    assert torch.equal(*planes)
    assert torch.equal(*y)


# ---- Norms ----


@pytest.mark.parametrize("features", [1, 31, 32, 33, 576, 1000])
def test_norms_equal_the_reference(native: NativeRing, features: int) -> None:
    x = torch.randn(40, features) * torch.logspace(-30, 15, 40)[:, None]
    x[3], x[5, -1], x[6, 0], x[7, -1] = 0, math.inf, -math.inf, math.nan
    columns = torch.randn(features)
    found, expected = native.token_norms(x, columns), TORCH.token_norms(x, columns)
    assert found.features == expected.features == features
    torch.testing.assert_close(found.largest, expected.largest, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found.squares, expected.squares, rtol=0, atol=0, equal_nan=True)
    assert torch.isfinite(found.largest).logical_not().nonzero().flatten().tolist() == [5, 6, 7]
    assert bool(found.squares[7].isnan())
    finite = torch.isfinite(expected.squares)
    exact = (x.double() * columns.double()).square().sum(dim=1)
    torch.testing.assert_close(found.squares[finite].double(), exact[finite], rtol=1e-5, atol=1e-44)


# ---- Checks ----


@pytest.mark.parametrize(
    ("rows", "features", "tokens"), [(1, 1, 16), (16, 64, 256), (19, 515, 32), (64, 3, 16), (16, 2050, 16)]
)
def test_checks_equal_the_reference(native: NativeRing, rows: int, features: int, tokens: int) -> None:
    image = torch.randint(-LARGEST_IMAGE, LARGEST_IMAGE + 1, (rows, features), dtype=torch.int32)
    signs = torch.randint(-1, 2, (rows, features)).to(torch.int8)
    planes = torch.randint(-128, 128, (3, tokens, features)).to(torch.int8)
    u = torch.randint(-(1 << 15), 1 << 15, (tokens, features)).to(torch.int16)
    assert torch.equal(native.check_up(image, planes), TORCH.check_up(image, planes))
    assert torch.equal(native.check_down(signs, u), TORCH.check_down(signs, u))


@pytest.mark.parametrize("features", [511, 512, 4100])
@pytest.mark.parametrize("entry", [-LARGEST_IMAGE, LARGEST_IMAGE])
@pytest.mark.parametrize("digit", [-128, 127])
def test_extreme_checks_are_exact(native: NativeRing, features: int, entry: int, digit: int) -> None:
    image = torch.full((16, features), entry, dtype=torch.int32)
    planes = torch.full((3, 16, features), digit, dtype=torch.int8)
    total = 64 * features * entry * plain.value([digit] * 3) % MODULUS
    assert native.check_up(image, planes).tolist() == [[total] * 16] * 16
    assert TORCH.check_up(image, planes).tolist() == [[total] * 16] * 16
    for sign, u in ((1, -(1 << 15)), (-1, -1), (-1, -(1 << 15)), (1, plain.LEVELS - 1)):
        signs = torch.full((16, features), sign, dtype=torch.int8)
        matrix = torch.full((16, features), u, dtype=torch.int16)
        assert native.check_down(signs, matrix).tolist() == [[features * sign * u % plain.LEVELS] * 16] * 16


# ---- Results as they travel ----


@pytest.mark.parametrize("features", [1, 16, 63, 64, 65, 200])
def test_what_was_packed_is_unpacked(kernels: RingKernels, features: int) -> None:
    u = torch.randint(0, plain.LEVELS, (32, features)).to(torch.int16)
    u.view(-1)[::5], u.view(-1)[1::5] = 0, plain.LEVELS - 1
    packed = pack(u)
    assert [bytes(row) for row in packed.tolist()] == [plain.packed(row) for row in u.tolist()]
    whole = torch.full((32, features + 9), 7, dtype=torch.int16)
    kernels.unpack(packed, whole[:, 5 : 5 + features])
    assert torch.equal(whole[:, 5 : 5 + features], u)
    assert bool((whole[:, :5] == 7).all() and (whole[:, 5 + features :] == 7).all())


def test_every_value_is_packed_in_every_place(kernels: RingKernels) -> None:
    u = (torch.arange(plain.LEVELS)[:, None] + 257 * torch.arange(64)) % plain.LEVELS
    out = torch.empty(plain.LEVELS, 64, dtype=torch.int16)
    kernels.unpack(pack(u), out)
    assert torch.equal(out, u.to(torch.int16))


# ---- A worker's epilogue ----


def epilogue_of(kernels: RingKernels) -> Epilogue:
    """The worker's for the same instruction set."""
    found = epilogue.REFERENCE if kernels is TORCH else epilogue.native(kernels.name)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def products() -> torch.Tensor:
    """Random and extreme products, and those whose sum lies beside every kind of edge of the rounding."""
    extremes = [-(2**31), 2**31 - 1, -1, 0, 1]
    sums = [(k * plain.Q + delta) // 64 for k in (-2, 0, 1, 3) for delta in range(-200, 200, 9)]
    sums += [
        ((2 * k + 1) * plain.Q // (2 * plain.LEVELS) + step) // 64
        for k in (0, 1, 99, plain.LEVELS - 2, plain.LEVELS - 1)
        for step in range(-99, 99, 9)
    ]
    rows = [(a, b, c) for a in extremes for b in extremes for c in extremes]
    rows += [(total & 0xFF, (total >> 8) & 0xFF, total >> 16) for total in sums]
    random = torch.randint(-(2**31), 2**31, (-len(rows) % 200 + 4000, 3)).tolist()
    return torch.tensor([*rows, *random]).to(torch.int32).t().contiguous().view(3, -1, 200)


def test_switching_rounds_exactly(kernels: RingKernels, products: torch.Tensor) -> None:
    out = torch.full((products.shape[1], 4 * 112), 7, dtype=torch.uint8)
    epilogue_of(kernels).switch(products, out)
    u = [
        [plain.switch(*three) for three in zip(*token, strict=True)]
        for token in products.transpose(0, 1).tolist()
    ]
    assert [bytes(row) for row in out.tolist()] == [plain.packed(row) for row in u]


@pytest.mark.parametrize("features", [1, 64, 200])
@pytest.mark.parametrize("tokens", [1, 2048])
def test_switching_reads_and_writes_parts_of_matrices(
    kernels: RingKernels, features: int, tokens: int
) -> None:
    """Products and results whose rows are apart, as slabs are, and enough of them for several threads."""
    size = packed_bytes(features)
    whole = torch.randint(-(2**31), 2**31, (3, tokens, features + 9)).to(torch.int32)
    part, out = whole[:, :, 4 : 4 + features], torch.full((tokens, size + 10), 7, dtype=torch.uint8)
    epilogue_of(kernels).switch(part, out[:, 3 : 3 + size])
    expected = torch.empty(tokens, size, dtype=torch.uint8)
    epilogue.REFERENCE.switch(part.contiguous(), expected)
    assert torch.equal(out[:, 3 : 3 + size], expected)
    assert bool((out[:, :3] == 7).all() and (out[:, 3 + size :] == 7).all())


def test_switching_refuses_what_does_not_fit() -> None:
    found = epilogue.native()
    if found is None:
        pytest.skip("there was no C compiler when hetrain was installed")
    three, out = torch.zeros(3, 4, 6, dtype=torch.int32), torch.zeros(4, 112, dtype=torch.uint8)
    found.switch(three, out)
    for wrong, target in (
        (three, out.to(torch.int8)),
        (three.to(torch.int64), out),
        (three, out[:, :111]),
        (three, out[:3]),
        (three[:2], out),
        (three.transpose(1, 2).contiguous().transpose(1, 2), out),
        (three, out.t().contiguous().t()),
    ):
        with pytest.raises(ParameterError):
            found.switch(wrong, target)


# ---- All together ----


@pytest.mark.parametrize(("degree", "rank"), SETS[1:], ids=NAMES[1:])
def test_a_product_comes_back_and_passes_its_check(native: NativeRing, degree: int, rank: int) -> None:
    """x·Wᵀ up to noise; the check's two sides differ by rounding alone, and by far more if u is wrong."""
    features, n, tokens, limit = 100, 37, degree - 5, 4000
    masks, noise = words(7, rank * degree, LANES), keystream(7, degree)
    x = torch.randint(-limit, limit + 1, (tokens, features)).to(torch.float32)
    weights = torch.randint(-127, 128, (n, features))
    spectrum = native.spectrum(secrets(rank, degree)[0])
    planes = torch.empty(3, degree, features, dtype=torch.int8)
    native.encrypt(planes, 0, masks, noise, plain_message(x, limit), spectrum)
    products = [plane.to(torch.int32) @ weights.t().to(torch.int32) for plane in planes]
    packed, u = torch.empty(degree, 112, dtype=torch.uint8), torch.empty(degree, n, dtype=torch.int16)
    epilogue_of(native).switch(torch.stack(products), packed)
    native.unpack(packed, u)
    by_feature = masks.transpose(1, 2).reshape(-1, rank * degree)[:features].to(torch.int64)
    hint = torch.zeros(3 * LANES, rank * degree, dtype=torch.int64)
    hint[:n] = weights @ by_feature % MODULUS
    blocks = hint.view(3, LANES, -1).transpose(1, 2).to(torch.int32).contiguous()
    y = torch.empty(tokens, n)
    native.decrypt(y, 0, u, 0, blocks, ones(tokens, n), spectrum)
    exact = x.to(torch.int64) @ weights.t()
    largest = weights.abs().sum(dim=1).max() * (8 + 32) + MODULUS // (2 * plain.LEVELS) + 1
    assert int((y.to(torch.float64) - exact).abs().max()) <= int(largest)

    rows = torch.randint(-1, 2, (16, n)).to(torch.int8)
    up = native.check_up((rows.to(torch.int64) @ weights).to(torch.int32), planes).to(torch.int64)

    def distance(result: torch.Tensor) -> float:
        turn = MODULUS * plain.LEVELS
        difference = up * plain.LEVELS - MODULUS * native.check_down(rows, result).to(torch.int64)
        return float(((difference + turn // 2) % turn - turn // 2).abs().max() / MODULUS)

    assert distance(u) <= n / 2, "each of n roundings is half a unit at most"
    wrong = u.clone()
    wrong[3, int(rows.abs().sum(dim=0).argmax())] += 1000
    assert distance(wrong) > 900


# ---- What is refused ----


def test_operands_that_do_not_fit_never_reach_the_kernels(native: NativeRing) -> None:
    spectrum = native.spectrum(secrets(8, 256)[0])
    planes, masks = torch.zeros(3, 256, 20, dtype=torch.int8), torch.zeros(2, 2048, 16, dtype=torch.int32)
    noise, x, inverse = torch.zeros(2 * 32 * 256, dtype=torch.uint8), torch.zeros(9, 20), torch.ones(9)
    columns = torch.ones(20)
    native.encrypt(planes, 0, masks, noise, Message(x, columns, inverse, 5), spectrum)
    for arguments in (
        (planes, 16, masks, noise, Message(x, columns, inverse, 5)),
        (planes, 8, masks[:1], noise[: 32 * 256], Message(x, columns, inverse, 5)),
        (planes, -16, masks, noise, Message(x, columns, inverse, 5)),
        (planes[:2], 0, masks, noise, Message(x, columns, inverse, 5)),
        (planes, 0, masks[:, :256], noise, Message(x, columns, inverse, 5)),
        (planes, 0, masks, noise[1:], Message(x, columns, inverse, 5)),
        (planes, 0, masks, noise, Message(x.double(), columns, inverse, 5)),
        (planes, 0, masks, noise, Message(x, columns, inverse[:8], 5)),
        (planes, 0, masks, noise, Message(x, columns[:19], inverse, 5)),
        (planes, 0, masks, noise, Message(x, columns.double(), inverse, 5)),
        (planes, 0, masks, noise, Message(x, columns, inverse, (1 << 24) + 1)),
        (planes, 0, masks, noise, plain_message(torch.zeros(257, 20), 5)),
        (planes, 0, masks, noise, Message(torch.zeros(20, 9).t(), columns, inverse, 5)),
    ):
        with pytest.raises(ParameterError):
            native.encrypt(*arguments, spectrum)
    y, u, scales = torch.zeros(9, 25), torch.zeros(256, 20, dtype=torch.int16), ones(9, 25)
    native.decrypt(y, 5, u, 0, masks, scales, spectrum)
    for arguments in (
        (y, 6, u, 0, masks, scales),
        (y, -1, u, 0, masks, scales),
        (y, 0, u, 16, masks, scales),
        (y, 0, u[:255], 0, masks, scales),
        (y, 0, u.to(torch.int32), 0, masks, scales),
        (y, 0, u, 0, masks[:, :, :8], scales),
        (y, 0, u, 0, masks, ResultScales(torch.ones(8), torch.ones(25))),
        (y, 0, u, 0, masks, ResultScales(torch.ones(9), torch.ones(24))),
        (torch.zeros(257, 25), 0, u, 0, masks, ones(257, 25)),
    ):
        with pytest.raises(ParameterError):
            native.decrypt(*arguments, spectrum)
    packed = torch.zeros(256, 112, dtype=torch.uint8)
    native.unpack(packed, u)
    for arguments in (
        (packed.to(torch.int8), u),
        (packed, u.to(torch.int32)),
        (packed[:, :111], u),
        (packed[:255], u),
        (packed, torch.zeros(256, 65, dtype=torch.int16)),
        (packed.t().contiguous().t(), u),
        (packed, torch.zeros(20, 256, dtype=torch.int16).t()),
    ):
        with pytest.raises(ParameterError):
            native.unpack(*arguments)
    native.token_norms(x, columns)
    for arguments in (
        (x, columns[:19]),
        (x.double(), columns),
        (x, columns.double()),
        (torch.zeros(20, 9).t(), columns),
        (torch.zeros(9, 0), torch.zeros(0)),
    ):
        with pytest.raises(ParameterError):
            native.token_norms(*arguments)
    image, signs = torch.zeros(3, 20, dtype=torch.int32), torch.zeros(3, 20, dtype=torch.int8)
    native.check_up(image, planes)
    native.check_down(signs, u)
    for check, left, right in (
        (native.check_up, image + LARGEST_IMAGE + 1, planes),
        (native.check_up, image - LARGEST_IMAGE - 1, planes),
        (native.check_up, image[:, :19], planes),
        (native.check_up, image, planes[:, :, ::2]),
        (native.check_down, signs, u[:, :19]),
        (native.check_down, signs.to(torch.int32), u),
    ):
        with pytest.raises(ParameterError):
            check(left, right)
    for shape in ((1, 4096), (1, 1536), (2048,)):
        with pytest.raises(ParameterError):
            native.spectrum(torch.zeros(shape, dtype=torch.int8))
    with pytest.raises(ParameterError):
        MaskBlocks(SEED).fill(torch.empty(1, 16, 2048, dtype=torch.int32), 0)


def test_secrets_stay_where_they_are(kernels: RingKernels) -> None:
    secret = kernels.spectrum(secrets(8, 256)[0])
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be serialised"):
            leave(secret)
    assert "array" not in repr(secret)
    assert "tensor" not in repr(secret)


def test_the_environment_lowers_the_instruction_set(
    monkeypatch: pytest.MonkeyPatch, native: NativeRing
) -> None:
    monkeypatch.setenv(compiled.VARIABLE, native.name)
    lowered = NativeRing.best()
    assert lowered is not None
    assert lowered.level == native.level
    monkeypatch.setenv(compiled.VARIABLE, "sse9")
    with pytest.raises(UsageError, match="sse9"):
        NativeRing.best()


def test_without_a_compiler_torch_does_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert compiled.load(tmp_path, "_ring", 1) is None
    monkeypatch.setattr(NativeRing, "best", staticmethod(lambda: None))
    ring_kernels.cache_clear()
    try:
        assert ring_kernels() == TORCH
    finally:
        ring_kernels.cache_clear()


# ---- Known answers ----


def known(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def test_known_masks(version: str) -> None:
    vectors = known("masks")
    seed = PublicSeed(bytes.fromhex(vectors["seed"]))
    for one in vectors["blocks"]:
        block = torch.empty(1, 2048, LANES, dtype=torch.int32)
        MaskBlocks(seed).fill(block, one["block"])
        flat = block.view(-1)
        assert flat[:8].tolist() == one["first"]
        assert flat[-1] == one["last"]
        assert golden.digest(flat.numpy(), "<u4") == one["digest"]


def test_known_transforms() -> None:
    for one in known("transform"):
        degree = one["degree"]
        a = torch.tensor([pow(7, i, MODULUS) for i in range(degree)])
        values = ring.forward(a[:, None])[:, 0]
        assert ring.root_of_unity(degree) == one["psi"]
        assert values[: len(one["first"])].tolist() == one["first"]
        assert golden.digest(values.numpy(), "<u4") == one["digest"]


@pytest.mark.parametrize("index", range(len(golden.SETS)))
def test_known_products(index: int, kernels: RingKernels) -> None:
    """Wire planes, results, hints, checks and decrypted values, with fixed randomness."""
    limit, vectors = known("products")["limit"], known("products")["cases"][index]
    degree, rank, features = (vectors[key] for key in ("degree", "rank", "features"))
    assert (degree, rank, features) == golden.SETS[index]
    case = {key: torch.from_numpy(array.copy()) for key, array in golden.inputs(*golden.SETS[index]).items()}
    masks, spectrum = expand_masks(SEED, features), kernels.spectrum(case["secret"])
    weights, tokens = case["weights"], len(case["x"])

    planes = torch.empty(3, degree, features, dtype=torch.int8)
    message = Message(case["x"], torch.ones(features), case["inverse"], limit)
    kernels.encrypt(planes, 0, masks, case["keystream"], message, spectrum)
    assert planes[:, 0, 0].tolist() == vectors["wire"]["first"]
    assert golden.digest(planes.numpy(), "<i1") == vectors["wire"]["digest"]

    packed = torch.empty(degree, 112, dtype=torch.uint8)
    u = torch.empty(degree, golden.WEIGHTS, dtype=torch.int16)
    epilogue_of(kernels).switch(planes.to(torch.int32) @ weights.t().to(torch.int32), packed)
    kernels.unpack(packed, u)
    assert golden.digest(packed.numpy(), "u1") == vectors["packed"]["digest"]
    assert golden.digest(u.numpy(), "<i2") == vectors["result"]["digest"]

    by_feature = masks.transpose(1, 2).reshape(-1, 2048)[:features].to(torch.int64)
    hint = torch.zeros(LANES, 2048, dtype=torch.int64)
    hint[: golden.WEIGHTS] = weights.to(torch.int64) @ by_feature % MODULUS
    assert golden.digest(hint[: golden.WEIGHTS].numpy(), "<u4") == vectors["hint"]["digest"]
    y = torch.empty(tokens, golden.WEIGHTS)
    block = hint.t().to(torch.int32).contiguous()[None]
    kernels.decrypt(y, 0, u, 0, block, ones(tokens, golden.WEIGHTS), spectrum)
    assert y[0].tolist() == [float(np.float32(value)) for value in vectors["opened"]["first"]]
    assert golden.digest(y.numpy(), "<f4") == vectors["opened"]["digest"]

    image = (case["rows"].to(torch.int64) @ weights.to(torch.int64)).to(torch.int32)
    assert golden.digest(kernels.check_up(image, planes).numpy(), "<u4") == vectors["check_up"]["digest"]
    assert (
        golden.digest(kernels.check_down(case["rows"], u).numpy(), "<u2") == vectors["check_down"]["digest"]
    )
