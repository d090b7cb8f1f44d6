"""Secrets, noise and masks: the right distributions, from the right generators."""

from __future__ import annotations

import hashlib
import inspect
import math
import re
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

from hetrain.public.errors import WireError
from hetrain.public.lattice.header import RlweHeader
from hetrain.public.lattice.masks import PublicSeed, expand_mask
from hetrain.secret import randomness
from hetrain.secret.randomness import (
    SecretStream,
    centred_binomial,
    sample_ternary,
    ternary,
)


def chi_squared_excess(observed: list[int], expected: list[float]) -> float:
    """(χ² − dof)/√(2·dof): about N(0, 1) for the right distribution."""
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    dof = len(expected) - 1
    return (statistic - dof) / math.sqrt(2 * dof)


def counts(samples: torch.Tensor, low: int, high: int) -> list[int]:
    assert low <= int(samples.min())
    assert int(samples.max()) <= high
    return torch.bincount(samples.to(torch.int64) - low, minlength=high - low + 1).tolist()


def test_ternary_of_every_byte() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert ternary(every).tolist() == [byte % 3 - 1 for byte in range(255)]


@pytest.mark.parametrize("count", [1, 2, 255, 2048])
def test_ternary_gives_as_many_as_asked(count: int) -> None:
    values = sample_ternary(SecretStream("test"), count)
    assert values.dtype == torch.int8
    assert values.shape == (count,)


def test_ternary_asks_for_more_when_many_bytes_are_rejected() -> None:
    class Rejected(SecretStream):
        """A stream whose first answers hold rejected bytes only."""

        refusals = 3

        def take(self, nbytes: int) -> torch.Tensor:
            self.refusals -= 1
            return (
                torch.full((nbytes,), 255, dtype=torch.uint8) if self.refusals >= 0 else super().take(nbytes)
            )

    assert sample_ternary(Rejected("test"), 100).shape == (100,)


def test_ternary_is_uniform() -> None:
    n = 3_000_000
    assert chi_squared_excess(counts(sample_ternary(SecretStream("test"), n), -1, 1), [n / 3] * 3) < 20


@pytest.mark.parametrize("eta", [1, 7, 8, 9, 16, 20, 21])
def test_centred_binomial_counts_bits(eta: int) -> None:
    n = 64
    fixed = [torch.zeros(6 * n), torch.full((6 * n,), 255), torch.arange(6 * n) % 256]
    samples = [
        *(data.to(torch.uint8) for data in fixed),
        *(SecretStream("test").take(6 * n) for _ in range(8)),
    ]
    for data in samples:
        sides = [[bytes(data.view(2, 3, n)[side, :, i].tolist()) for i in range(n)] for side in (0, 1)]
        ones = [
            [(int.from_bytes(b, "little") & ((1 << eta) - 1)).bit_count() for b in side] for side in sides
        ]
        expected = [a - b for a, b in zip(*ones, strict=True)]
        assert centred_binomial(data.clone(), eta).tolist() == expected


def noise(count: int, eta: int) -> torch.Tensor:
    """`count` values, a multiple of 8, of fresh noise."""
    return centred_binomial(SecretStream("test").take(6 * count), eta)


@pytest.mark.parametrize("eta", [16, 21])
def test_centred_binomial_distribution(eta: int) -> None:
    n = 1_000_000
    samples = noise(n, eta)
    assert samples.dtype == torch.int8
    observed = counts(samples, -eta, eta)
    expected = [n * math.comb(2 * eta, eta + e) / 4**eta for e in range(-eta, eta + 1)]
    # Tails join into bins of at least 50 expected samples, as χ² asks for.
    inner = [e for e in range(2 * eta + 1) if expected[e] >= 50]
    first, last = inner[0], inner[-1]

    def binned(values: list[int] | list[float]) -> list[float]:
        return [sum(values[:first]), *values[first : last + 1], sum(values[last + 1 :])]

    assert chi_squared_excess(binned(observed), binned(expected)) < 10  # type: ignore[arg-type]
    values = samples.to(torch.float64)
    assert abs(float(values.mean())) < 8 * math.sqrt(eta / 2 / n)
    assert float(values.var()) == pytest.approx(eta / 2, rel=8 * math.sqrt(2 / n))


def test_neighbouring_noise_is_uncorrelated() -> None:
    e = noise(1 << 20, 21).to(torch.float64)
    for lag in (1, 2, 7, 8, 64):
        correlation = float((e[lag:] * e[:-lag]).mean()) / 10.5
        assert abs(correlation) < 8 / math.sqrt(e.numel()), lag


def test_streams_never_repeat() -> None:
    roles = ("hetrain.secret", "hetrain.noise", "hetrain.secret", "hetrain.noise")
    pieces = [bytes(SecretStream(role).take(64).tolist()) for role in roles]
    stream = SecretStream("hetrain.noise")
    pieces += [bytes(stream.take(64).tolist()) for _ in range(2)]
    assert len({piece[i : i + 16] for piece in pieces for i in range(0, 64, 16)}) == 4 * len(pieces)


def test_same_root_gives_different_streams_to_different_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomness.secrets, "token_bytes", bytes)
    secret, again, noise = (SecretStream(role).take(32) for role in ("a", "a", "b"))
    assert torch.equal(secret, again)
    assert not torch.equal(secret, noise)


def test_secret_randomness_takes_no_seed_and_knows_no_other_generator() -> None:
    source = inspect.getsource(randomness)
    code = re.sub(r'""".*?"""|#[^\n]*', "", source, flags=re.DOTALL)
    assert not re.search(r"seed|Generator|torch\.rand|numpy\.random|import random|hetrain\.public", code)
    assert list(inspect.signature(SecretStream).parameters) == ["role"]


def expected_mask(seed: bytes, words: int) -> list[int]:
    """AES-256 of the big-endian counters 0, 1, 2, ... under BLAKE2b-256(seed), as little-endian words."""
    key = hashlib.blake2b(seed, digest_size=32, person=b"hetrain.mask.v1").digest()
    counters = b"".join(i.to_bytes(16, "big") for i in range(-(-words // 4)))
    stream = Cipher(AES(key), ECB()).encryptor().update(counters)
    return [int.from_bytes(stream[4 * i : 4 * i + 4], "little", signed=True) for i in range(words)]


@pytest.mark.parametrize(("polynomials", "dimension"), [(1, 4), (3, 2048), (130, 2048), (7, 6)])
def test_masks_are_the_documented_keystream(polynomials: int, dimension: int) -> None:
    seed = PublicSeed(bytes(range(32)))
    mask = expand_mask(seed, polynomials, dimension)
    assert mask.dtype == torch.int32
    assert mask.shape == (polynomials, dimension)
    assert mask.flatten().tolist() == expected_mask(seed.value, polynomials * dimension)


def test_first_mask_words_are_known() -> None:
    """Fixed answers: a change of derivation would make old and new versions multiply by different masks."""
    assert expand_mask(PublicSeed(bytes(range(32))), 1, 4).tolist() == [
        [326219880, -2049511839, 487022876, 1330776]
    ]


def test_mask_rows_do_not_depend_on_their_number() -> None:
    seed = PublicSeed.fresh()
    assert torch.equal(expand_mask(seed, 200, 2048)[:5], expand_mask(seed, 5, 2048))


def header_with(seed: object) -> RlweHeader:
    header: Any = {"parameters": "rlwe-256x8", "mask_seed": seed}
    return RlweHeader.from_wire(header, where="test")


def test_fresh_seeds_differ_and_travel_as_hexadecimal() -> None:
    one, other = PublicSeed.fresh(), PublicSeed.fresh()
    assert one != other
    assert header_with(one.hex()).seed == one
    assert not torch.equal(expand_mask(one, 1, 64), expand_mask(other, 1, 64))


@pytest.mark.parametrize("value", [b"", bytes(31), bytes(33), "a" * 32, bytearray(32), None, 32])
def test_wrong_seeds_are_refused(value: object) -> None:
    with pytest.raises(WireError):
        PublicSeed(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "00" * 31,
        "00" * 33,
        "0g" * 32,
        "00 " * 32,
        "00" * 32 + "\n",
        "AB" * 32,
        "٠" * 64,
        7,
        b"00" * 32,
    ],
)
def test_wrong_seed_texts_are_refused(text: object) -> None:
    with pytest.raises(WireError, match="mask_seed"):
        header_with(text)


def test_a_header_asks_for_the_mask_product_or_not() -> None:
    for wrong in ({}, {"mask_seed": None}, {"mask_seed": "00" * 32, "result": "b"}):
        with pytest.raises(WireError, match="mask_seed"):
            RlweHeader.from_wire({"parameters": "rlwe-256x8", **wrong}, where="test")
    hinted = RlweHeader.from_wire({"parameters": "rlwe-256x8", "result": "b"}, where="test")
    assert hinted.seed is None
    assert hinted.result_format.row_bytes == 2 * 256
    assert header_with("00" * 32).result_format.row_bytes == 2 * 256 + 3 * 2048
