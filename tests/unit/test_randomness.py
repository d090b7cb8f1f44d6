"""Secrets, noise and masks: the right distributions, from the right generators."""

from __future__ import annotations

import inspect
import itertools
import math
import re

import pytest
import torch

from hetrain.public.errors import WireError
from hetrain.public.lattice.header import RlweHeader
from hetrain.public.lattice.masks import PublicSeed
from hetrain.public.lattice.parameters import ETA
from hetrain.secret import randomness
from hetrain.secret.engines.rlwe.torch_ring import noise as centred_binomial
from hetrain.secret.randomness import SecretStream, sample_ternary, ternary


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


def noise(count: int) -> torch.Tensor:
    """`count` values of fresh noise."""
    return centred_binomial(SecretStream("test").take(2 * count))


def test_centred_binomial_counts_bits() -> None:
    every = torch.cartesian_prod(torch.arange(256), torch.arange(256)).to(torch.uint8).flatten()
    expected = [a.bit_count() - b.bit_count() for a, b in itertools.product(range(256), repeat=2)]
    assert centred_binomial(every).tolist() == expected


def test_centred_binomial_distribution() -> None:
    n, eta = 1_000_000, ETA
    samples = noise(n)
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
    e = noise(1 << 20).to(torch.float64)
    for lag in (1, 2, 7, 8, 64):
        correlation = float((e[lag:] * e[:-lag]).mean()) / (ETA / 2)
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


@pytest.mark.parametrize("value", [b"", bytes(31), bytes(33), "a" * 32, bytearray(32), None, 32])
def test_wrong_seeds_are_refused(value: object) -> None:
    with pytest.raises(WireError):
        PublicSeed(value)  # type: ignore[arg-type]


def test_a_header_says_what_the_payload_is() -> None:
    good = {"parameters": "rlwe-256x8", "operand": "ciphertext"}
    assert RlweHeader.from_wire(good, where="test").result_format.operand_bytes(5) == 3 * 256 * 5
    for wrong in ({"operand": "secret"}, {"operand": None}, {"parameters": "rlwe-128x16"}, {"more": 1}):
        with pytest.raises(WireError, match=next(iter(wrong))):
            RlweHeader.from_wire(good | wrong, where="test")
