"""Client half of `rlwe`: encrypts a matrix of tokens, decrypts the product with a public matrix.

Feature k of all T tokens is one polynomial m_k(X) = Σ_t x[t,k]·X^t, and

    b_k = a_k·s + e_k + m_k   modulo 2^32,      a_k public, from a seed;  s, e_k fresh for every matrix.

A worker returns b' = W·b and a' = W·a with their low bits dropped, and  b' − a'·s = W·m + noise. Once the
client has a' from an earlier product (`hetrain.secret.engines.rlwe.hints`), a worker returns b' alone.

Rule 1 of the security parameters is kept by construction: `seal` is the only place that draws a secret, it
encrypts one matrix under it, and the secret leaves it only inside the `Opening`, which cannot encrypt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hetrain.public.lattice.header import RlweHeader
from hetrain.public.lattice.masks import MaskStream, PublicSeed
from hetrain.public.lattice.parameters import ParameterSet, parameters_for
from hetrain.public.lattice.result_format import HINT_PLANES, ResultFormat, largest_operand
from hetrain.public.protocol.messages import EngineHeader, Header
from hetrain.public.protocol.product import Operand, Part, Product
from hetrain.public.workspace import unaligned_empty, workspace
from hetrain.secret.activation_quantization import limited, token_scales
from hetrain.secret.engines.rlwe.hints import Hint, HintStore
from hetrain.secret.engines.rlwe.kernels import BLOCK_ROWS, ScaledOperand, kernels
from hetrain.secret.randomness import SecretStream, sample_ternary


@dataclass(frozen=True, repr=False)
class RlweOpening:
    """The secret of one ciphertext matrix and the scales of its tokens.

    Results without a mask product take it from `hint`; results with one give it to `hint`, if there is one.
    """

    result_format: ResultFormat
    secret: Any
    scales: torch.Tensor
    hint: Hint | None = None

    def check(self, part: Part) -> None:
        """Offers a' to the hint, where it comes along; see `hetrain.secret.engine.Opening.check`."""
        _, *mask_product = self.result_format.read_result(part.data, part.n)
        if mask_product and self.hint is not None:
            self.hint.offer(mask_product, part)

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
        b, *mask_product = self.result_format.read_result(part.data, part.n)
        for first in range(0, part.n, BLOCK_ROWS):
            block = b[first : first + BLOCK_ROWS]
            a = [plane[first : first + BLOCK_ROWS] for plane in mask_product] or self._read_hint(
                part.rows[0] + first, len(block)
            )
            kernels().decrypt(out, column + first, (block, *a), self.scales, self.secret)

    def _read_hint(self, start: int, rows: int) -> list[torch.Tensor]:
        assert self.hint is not None
        planes = [workspace(f"hint {dtype}", (rows, width), dtype) for dtype, width in HINT_PLANES]
        self.hint.read(start, planes)
        return planes


@dataclass(frozen=True, repr=False)
class RlweSealed:
    """A ciphertext matrix: b as int32 [K, N]; its header is a `RlweHeader`."""

    operand: Operand
    opening: RlweOpening


@dataclass(frozen=True)
class RlweSealer:
    """See `hetrain.secret.engine.Sealer`. A job has no keys: every ciphertext matrix has its own secret.

    `bits` limits the operand's precision; None takes all that fits. With `hints` the masks of a product stay
    the same throughout the job; without, every ciphertext matrix has its own mask, too.
    """

    bits: int | None = None
    hints: HintStore | None = None

    @property
    def setup(self) -> Header:
        """Empty."""
        return EngineHeader().to_wire()

    def seal(self, x: torch.Tensor, product: Product) -> RlweSealed:
        """Encrypts one operand; see `hetrain.secret.engine.Sealer.seal`."""
        hint = None if self.hints is None else self.hints.hint(product)
        return seal(x, product.max_l1, self.bits, hint)


def seal(x: torch.Tensor, max_l1: int, bits: int | None = None, hint: Hint | None = None) -> RlweSealed:
    """Encrypts X under a fresh secret.

    Args:
        x: floating point [T, K], T ≤ 2048; token t takes coefficient t, unused coefficients are zero.
        max_l1: max_j ‖W_j‖₁ of the matrix that will multiply X: fixes the token scale such that no product
            wraps.
        bits: entries get at most so many signed bits.
        hint: the mask to use, and its product if it is ready; None draws a fresh mask.

    Raises:
        ParameterError: more than 2048 tokens, or a matrix with too large rows.
        NotFinite: x has a NaN or an infinity.
    """
    parameters = parameters_for(x.shape[0])
    x = x.detach().to(device="cpu", dtype=torch.float32).contiguous()
    x_max = limited(largest_operand(parameters, max_l1), bits)
    scales = token_scales(x, x_max)
    secret = _fresh_secret(parameters)
    result_format = ResultFormat(parameters, has_mask_product=hint is None or not hint.is_ready)
    seed = PublicSeed.fresh() if hint is None else hint.seed
    b = encrypt(x, scales, x_max, seed, secret, parameters)
    header = RlweHeader.of(result_format, seed).to_wire()
    return RlweSealed(
        Operand(header, [b.numpy().data.cast("B")], result_format.row_bytes),
        RlweOpening(result_format, secret, scales, hint),
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
    operand = ScaledOperand(x, scales.reciprocal(), x_max, parameters.eta)
    mask_stream, noise_stream = MaskStream(seed), SecretStream("hetrain.noise")
    out = unaligned_empty((k, degree), torch.int32)
    for start in range(0, k, BLOCK_ROWS):
        block = out[start : start + BLOCK_ROWS]
        masks = workspace("masks", (len(block), parameters.dimension), torch.int32)
        keystream = workspace("keystream", (6 * block.numel(),), torch.uint8)
        mask_stream.fill(masks)
        noise_stream.fill(keystream)
        kernels().encrypt(block, operand, start, masks, keystream, secret)
    return out
