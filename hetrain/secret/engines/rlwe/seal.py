"""Client half of `rlwe`: encrypts a matrix of tokens, decrypts the product with a public matrix.

Feature k of all T tokens is one polynomial m_k(X) = Σ_t x[t,k]·X^t, and

    b_k = a_k·s + e_k + m_k   modulo 2^32,      a_k public, from a seed;  s, e_k fresh for every matrix.

A worker returns b' = W·b and a' = W·a with their low bits dropped, and  b' − a'·s = W·m + noise. Where the
client has kept a' from before (`hetrain.secret.engines.rlwe.hints`), b' alone.

Rule 1 of the security parameters is kept by construction: `seal` is the only place that draws a secret, it
encrypts one matrix under it, and the secret leaves it only inside the `Opening`, which cannot encrypt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hetrain.public.errors import WireError
from hetrain.public.lattice.masks import MaskStream, PublicSeed
from hetrain.public.lattice.parameters import (
    MODULUS_BITS,
    SWITCHED_A_BITS,
    SWITCHED_B_BITS,
    ParameterSet,
    largest_operand,
    parameters_for,
)
from hetrain.public.protocol.messages import Header
from hetrain.public.protocol.product import Operand, Part, Product
from hetrain.public.workspace import unaligned_empty, workspace
from hetrain.secret.activation_quantization import limited, token_scales
from hetrain.secret.engines.rlwe.hints import Hint, HintStore
from hetrain.secret.engines.rlwe.kernels import BLOCK_ROWS, kernels
from hetrain.secret.randomness import SecretStream, sample_ternary

_B_SHIFT = MODULUS_BITS - SWITCHED_B_BITS
_A_SHIFT = MODULUS_BITS - SWITCHED_A_BITS


@dataclass(frozen=True, repr=False)
class RlweOpening:
    """The secret of one ciphertext matrix and the scales of its tokens.

    With a `hint` that was ready when the matrix was sealed, results are b' alone; with one that was not, a'
    comes along and is kept.
    """

    parameters: ParameterSet
    secret: Any
    scales: torch.Tensor
    hint: Hint | None = None
    hinted: bool = False

    def check(self, part: Part) -> None:
        """Offers a' to the hint, where it comes along; see `hetrain.secret.engine.Opening.check`."""
        _, planes = self._take_apart(part)
        if planes is not None and self.hint is not None:
            self.hint.offer(*planes, part)

    def open(self, parts: Sequence[Part]) -> torch.Tensor:
        """Y = X·Wᵀ, float32 [T, n]; see `hetrain.secret.engine.Opening`.

        Raises:
            WireError: a result's length is not that of its rows.
        """
        y = unaligned_empty((len(self.scales), sum(part.n for part in parts)), torch.float32)
        column = 0
        for part in parts:
            self._decrypt(part, y, column)
            column += part.n
        return y

    def _decrypt(self, part: Part, out: torch.Tensor, column: int) -> None:
        """scale·(b'·2^16 − (a'·2^8)·s) for the rows of `part`, as columns of `out`."""
        b, planes = self._take_apart(part)
        for first in range(0, part.n, BLOCK_ROWS):
            rows = slice(first, min(first + BLOCK_ROWS, part.n))
            if planes is None:
                high, low = self._kept(part.rows[0] + first, rows.stop - first)
            else:
                high, low = planes[0][rows], planes[1][rows]
            kernels().decrypt(out, column + first, b[rows], high, low, self.scales, self.secret)

    def _take_apart(self, part: Part) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """b' as int16 [n, N], and the planes of a', int16 and uint8 [n, d·N], where they come along."""
        n, data = part.n, part.data
        degree, dimension = self.parameters.ring_degree, self.parameters.dimension
        b_bytes, high_bytes = 2 * n * degree, 2 * n * dimension
        expected = b_bytes if self.hinted else b_bytes + high_bytes + n * dimension
        if data.nbytes != expected:
            raise WireError(f"a result of {n} rows has {data.nbytes} bytes, not {expected}")
        b = torch.frombuffer(data[:b_bytes], dtype=torch.int16).view(n, degree)
        if self.hinted:
            return b, None
        high = torch.frombuffer(data[b_bytes : b_bytes + high_bytes], dtype=torch.int16).view(n, dimension)
        low = torch.frombuffer(data[b_bytes + high_bytes :], dtype=torch.uint8).view(n, dimension)
        return b, (high, low)

    def _kept(self, start: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.hint is not None
        high = workspace("high", (rows, self.parameters.dimension), torch.int16)
        low = workspace("low", (rows, self.parameters.dimension), torch.uint8)
        self.hint.read(start, high, low)
        return high, low


@dataclass(frozen=True, repr=False)
class RlweSealed:
    """A ciphertext matrix: b as int32 [K, N], the mask's seed in the header."""

    operand: Operand
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

    def seal(self, x: torch.Tensor, product: Product) -> RlweSealed:
        """Encrypts one operand; see `hetrain.secret.engine.Sealer.seal`."""
        hint = None if self.hints is None else self.hints.hint(product)
        return seal(x, product.max_l1, self.bits, hint)


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
    x = x.detach().to(device="cpu", dtype=torch.float32).contiguous()
    x_max = limited(largest_operand(parameters, max_l1), bits)
    scales = token_scales(x, x_max)
    secret = _fresh_secret(parameters)
    hinted = hint is not None and hint.is_ready
    seed = PublicSeed.fresh() if hint is None else hint.seed
    b = encrypt(x, scales, x_max, seed, secret, parameters)
    wanted = {"result": "b"} if hinted else {"mask_seed": seed.hex()}
    return RlweSealed(
        Operand({"parameters": parameters.name, **wanted}, [b.numpy().data.cast("B")]),
        RlweOpening(parameters, secret, scales, hint, hinted),
    )


def _fresh_secret(parameters: ParameterSet) -> Any:
    values = sample_ternary(SecretStream("hetrain.secret"), parameters.dimension)
    return kernels().transform(values.view(parameters.rank, parameters.ring_degree))


def encrypt(
    x: torch.Tensor, scales: torch.Tensor, x_max: int, seed: PublicSeed, secret: Any, parameters: ParameterSet
) -> torch.Tensor:
    """b_k = a_k·s + e_k + round(x_k / scale) modulo 2^32.

    The caller owns rule 1: this (seed, secret) pair must never have met another message.

    Args:
        x: contiguous float32 [T, K], T ≤ N.
        scales: float32 [T].
        x_max: the largest entry after rounding.
        seed: expands to the masks a_k.
        secret: s [d, N], from `Kernels.transform`.
        parameters: N, d and the noise.

    Returns:
        int32 [K, N].
    """
    k, degree = x.shape[1], parameters.ring_degree
    inverse = scales.reciprocal()
    mask_stream, noise_stream = MaskStream(seed), SecretStream("hetrain.noise")
    out = unaligned_empty((k, degree), torch.int32)
    for start in range(0, k, BLOCK_ROWS):
        block = out[start : start + BLOCK_ROWS]
        masks = workspace("masks", (len(block), parameters.dimension), torch.int32)
        keystream = workspace("keystream", (6 * block.numel(),), torch.uint8)
        mask_stream.fill(masks)
        noise_stream.fill(keystream)
        kernels().encrypt(block, masks, keystream, x, inverse, x_max, start, parameters.eta, secret)
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
