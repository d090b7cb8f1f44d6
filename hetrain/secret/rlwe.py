"""Client half of `rlwe`: encrypts a matrix of tokens, decrypts the product with a public matrix.

Feature k of all T tokens is one polynomial m_k(X) = Σ_t x[t,k]·X^t, and

    b_k = a_k·s + e_k + m_k   modulo 2^32,      a_k public, from a seed;  s, e_k fresh for every matrix.

A worker returns b' = W·b and a' = W·a with their low bits dropped, and  b' − a'·s = W·m + noise. Where the
client has kept a' from before (`hetrain.secret.hints`), b' alone.

Rule 1 of the security parameters is kept by construction: `seal` is the only place that draws a secret, it
encrypts one matrix under it, and the secret leaves it only inside the `Opening`, which cannot encrypt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hetrain.public.errors import WireError
from hetrain.public.masks import PublicSeed, expand_mask
from hetrain.public.parameters import (
    MODULUS_BITS,
    SWITCHED_A_BITS,
    SWITCHED_B_BITS,
    ParameterSet,
    largest_operand,
    parameters_for,
)
from hetrain.public.plan import Group
from hetrain.public.wire import Direction, Header
from hetrain.secret.hints import Hint, HintStore, join_planes
from hetrain.secret.negacyclic import TransformedSecret
from hetrain.secret.quantisation import dequantise_result, limited, quantise_operand
from hetrain.secret.randomness import SecretStream, sample_centred_binomial, sample_ternary

_B_SHIFT = MODULUS_BITS - SWITCHED_B_BITS
_A_SHIFT = MODULUS_BITS - SWITCHED_A_BITS


@dataclass(frozen=True, repr=False)
class RlweOpening:
    """The secret of one ciphertext matrix and the scales of its tokens.

    With a `hint` that was ready when the matrix was sealed, results are b' alone; with one that was not, a'
    comes along and is kept.
    """

    parameters: ParameterSet
    secret: TransformedSecret
    scales: torch.Tensor
    hint: Hint | None = None
    hinted: bool = False

    def open(self, parts: Sequence[memoryview], rows: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Y = X·Wᵀ, float32 [T, n]; see `hetrain.secret.engine.Opening`."""
        values = torch.cat(
            [self.decrypt(part, start, stop) for part, (start, stop) in zip(parts, rows, strict=True)]
        )
        return dequantise_result(values, self.scales)

    def decrypt(self, part: memoryview, start: int, stop: int) -> torch.Tensor:
        """b'·2^16 − (a'·2^8)·s modulo 2^32, signed, for rows ``start:stop`` of the product: int32 [n, T].

        Raises:
            WireError: the result's length is not that of its rows, or its a' is found to be wrong.
        """
        n = stop - start
        b, planes = self._take_apart(part, n)
        if planes is not None and self.hint is not None:
            self.hint.offer(*planes, start)
        degree, tokens = self.parameters.ring_degree, self.scales.shape[0]
        out = torch.empty(n, degree, dtype=torch.int32)
        step = self.secret.block_rows
        for first in range(0, n, step):
            rows = slice(first, min(first + step, n))
            a = join_planes(planes[0][rows], planes[1][rows]) if planes else self._kept(start, rows)
            block = b[rows].to(torch.int32) << _B_SHIFT
            halves = block.view(-1, 2, degree // 2)
            torch.sub(halves, self.secret.dot(a), out=out[rows].view(-1, 2, degree // 2))
        return out[:, :tokens]

    def _take_apart(
        self, part: memoryview, n: int
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """b' as int16 [n, N], and the planes of a', int16 and uint8 [n, d·N], where they come along."""
        degree, dimension = self.parameters.ring_degree, self.parameters.dimension
        b_bytes, high_bytes = 2 * n * degree, 2 * n * dimension
        expected = b_bytes if self.hinted else b_bytes + high_bytes + n * dimension
        if part.nbytes != expected:
            raise WireError(f"a result of {n} rows has {part.nbytes} bytes, not {expected}")
        b = torch.frombuffer(part[:b_bytes], dtype=torch.int16).view(n, degree)
        if self.hinted:
            return b, None
        high = torch.frombuffer(part[b_bytes : b_bytes + high_bytes], dtype=torch.int16).view(n, dimension)
        low = torch.frombuffer(part[b_bytes + high_bytes :], dtype=torch.uint8).view(n, dimension)
        return b, (high, low)

    def _kept(self, start: int, rows: slice) -> torch.Tensor:
        assert self.hint is not None
        return self.hint.read(start + rows.start, start + rows.stop)


@dataclass(frozen=True, repr=False)
class RlweSealed:
    """A ciphertext matrix: b as int32 [K, N], the mask's seed in the header."""

    header: Header
    payload: list[memoryview]
    opening: RlweOpening


@dataclass(frozen=True)
class RlweSealer:
    """See `hetrain.secret.engine.Sealer`. A job has no keys: every ciphertext matrix has a secret of its own.

    `bits` limits the operand's precision; None takes all that fits. With `hints` the masks of a product stay
    the same throughout the job; without, every ciphertext matrix has a mask of its own, too.
    """

    bits: int | None = None
    hints: HintStore | None = None

    @property
    def setup(self) -> Header:
        """Workers need to know nothing in advance."""
        return {}

    def seal(self, x: torch.Tensor, group: Group, direction: Direction) -> RlweSealed:
        """Encrypts one operand; see `hetrain.secret.engine.Sealer.seal`."""
        hint = None if self.hints is None else self.hints.hint(group, direction)
        return seal(x, group.max_l1(direction), self.bits, hint)


def seal(x: torch.Tensor, max_l1: int, bits: int | None = None, hint: Hint | None = None) -> RlweSealed:
    """Encrypts X under a fresh secret.

    Args:
        x: floating point [T, K], T ≤ 2048; token t takes coefficient t, unused coefficients are zero.
        max_l1: max_j ‖W_j‖₁ of the matrix that the result will be multiplied by: fixes the token scale such
            that no product wraps.
        bits: entries get at most so many signed bits.
        hint: the mask to use, and what is known of its product; None draws a fresh mask.

    Raises:
        ParameterError: more than 2048 tokens, or a matrix with too large rows.
        NotFinite: x has a NaN or an infinity.
    """
    parameters = parameters_for(x.shape[0])
    operand = quantise_operand(x, limited(largest_operand(parameters, max_l1), bits))
    secret = _fresh_secret(parameters)
    hinted = hint is not None and hint.is_ready
    seed = PublicSeed.fresh() if hint is None else hint.seed
    b = encrypt(operand.values, seed, secret, parameters)
    wanted = {"result": "b"} if hinted else {"mask_seed": seed.hex()}
    return RlweSealed(
        header={"parameters": parameters.name, **wanted},
        payload=[b.numpy().data.cast("B")],
        opening=RlweOpening(parameters, secret, operand.scales, hint, hinted),
    )


def _fresh_secret(parameters: ParameterSet) -> TransformedSecret:
    values = sample_ternary(SecretStream("hetrain.secret"), parameters.dimension)
    return TransformedSecret(values.view(parameters.rank, parameters.ring_degree))


def encrypt(
    messages: torch.Tensor, seed: PublicSeed, secret: TransformedSecret, parameters: ParameterSet
) -> torch.Tensor:
    """b_k = a_k·s + e_k + m_k modulo 2^32.

    The caller owns rule 1: this (seed, secret) pair must never have met another message.

    Args:
        messages: int32 [K, T], T ≤ N.
        seed: expands to the masks a_k.
        secret: spectrum of s [d, N].
        parameters: N, d and the noise.

    Returns:
        int32 [K, N].
    """
    k, tokens = messages.shape
    degree = parameters.ring_degree
    masks = expand_mask(seed, k, parameters.dimension)
    noise_stream = SecretStream("hetrain.noise")
    out = torch.empty(k, degree, dtype=torch.int32)
    step = secret.block_rows
    for start in range(0, k, step):
        rows = slice(start, min(start + step, k))
        block = out[rows]
        count = block.numel()
        noise = sample_centred_binomial(noise_stream, count, parameters.eta)
        halves = (-1, 2, degree // 2)
        torch.add(secret.dot(masks[rows]), noise.view(halves), out=block.view(halves))
        block[:, :tokens] += messages[rows]
    return out


def predicted_noise_std(row_l2: torch.Tensor, parameters: ParameterSet) -> torch.Tensor:
    """Standard deviation of the decryption error of each output row, in integer units.

    Three independent parts: fresh noise √(eta/2)·‖W_j‖₂; rounding b', uniform over 2^16; rounding a', uniform
    over 2^8 and multiplied by s, whose n coefficients have variance 2/3.

    Args:
        row_l2: ‖W_j‖₂ of the int8 matrix, float [n].
    """
    fresh = parameters.noise_std * row_l2.to(torch.float64)
    from_b = (1 << _B_SHIFT) / 12**0.5
    from_a = (1 << _A_SHIFT) / 12**0.5 * (parameters.dimension * 2 / 3) ** 0.5
    variance: torch.Tensor = fresh.square() + from_b**2 + from_a**2
    return variance.sqrt()
