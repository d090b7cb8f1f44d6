"""Activations and gradients as integers, one scale per token: the better of two bounds on the product."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hetrain.public.errors import NotFinite
from hetrain.public.lattice.bounds import LARGEST_ENTRY, OperandBound

_MARGIN = 1 - 2.0**-8
"""For the rounding of float32, above all of sums of squares."""
_SMALLEST_WITH_A_NORM = 1e-10
"""Below, squares of entries that count might vanish in float32: the first bound stands alone."""
SUMS = 32
"""Parts of a sum of squares: entry k is added to part k mod 32, and parts are added pairwise."""


@dataclass(frozen=True)
class QuantizedOperand:
    """x[t, k] ≈ scales[t]·values[t, k]; values int32 [T, K], scales float32 [T]."""

    values: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True, eq=False)
class TokenNorms:
    """Of each token of a matrix [T, K]: ‖x_t‖∞ and ‖x_t‖₂², float32 [T]. NaN where the token has one.

    `features` is K.
    """

    largest: torch.Tensor
    squares: torch.Tensor
    features: int


def token_norms(x: torch.Tensor, columns: torch.Tensor | None = None) -> TokenNorms:
    """The norms of each token of x·diag(columns), float32 [T, K] and [K].

    The reference of `RingKernels.token_norms`, which adds in the same order.
    """
    sizes = x.abs() if columns is None else (x * columns).abs_()
    parts = torch.zeros(len(x), SUMS)
    for squares in sizes.square().split(SUMS, dim=1):
        parts[:, : squares.shape[1]] += squares
    while parts.shape[1] > 1:
        low, high = parts.chunk(2, dim=1)
        parts = low + high
    return TokenNorms(sizes.amax(dim=1), parts[:, 0], x.shape[1])


def largest_entry(bits: int | None) -> int:
    """The largest entry of at most `bits` signed bits: 2^(bits-1) − 1, no more than `LARGEST_ENTRY`."""
    return LARGEST_ENTRY if bits is None else min(LARGEST_ENTRY, (1 << (bits - 1)) - 1)


def token_scales(norms: TokenNorms, bound: OperandBound, bits: int | None = None) -> torch.Tensor:
    """The smallest scale of each token that keeps round(x[t] / scale_t) within `bound` and `bits`.

        scale_t = max(min(‖x_t‖∞ / largest, ‖x_t‖₂ / (norm − √K/2)), ‖x_t‖∞ / largest_entry(bits))

    √K/2 is what rounding adds to a norm.

    Args:
        norms: of x.
        bound: of the matrix that x will be multiplied by.
        bits: the most signed bits of an entry.

    Returns:
        float32 [T].

    Raises:
        NotFinite: x has a NaN or an infinity.
    """
    largest = norms.largest
    if not bool(torch.isfinite(largest).all()):
        raise NotFinite(
            "the activations or gradients to encrypt are not finite",
            hint="training has diverged: lower `learning_rate` or set `max_grad_norm`",
        )
    scales = largest / (bound.largest * _MARGIN)
    norm = bound.norm * _MARGIN - math.sqrt(norms.features) / 2
    if norm > 0:
        lengths = norms.squares.sqrt()
        lengths.masked_fill_(largest < _SMALLEST_WITH_A_NORM, math.inf)
        scales = torch.minimum(scales, lengths / norm)
    scales = torch.maximum(scales, largest / largest_entry(bits))
    # The inverse of a denormal scale would overflow; such a token is zero for every purpose.
    return scales.clamp_min(torch.finfo(torch.float32).tiny)


def quantize_operand(
    x: torch.Tensor, bound: OperandBound, bits: int | None = None, columns: torch.Tensor | None = None
) -> QuantizedOperand:
    """Per token t: values = round(x / scale_t), with the scales of `token_scales`.

    Args:
        x: floating-point [T, K].
        bound: as in `token_scales`.
        bits: as in `token_scales`.
        columns: float32 [K]; x·diag(columns) takes the place of x.

    Raises:
        NotFinite: x has a NaN or an infinity.
    """
    x = x.detach().to(device="cpu", dtype=torch.float32)
    x = x if columns is None else x * columns
    scales = token_scales(token_norms(x), bound, bits)
    limit = largest_entry(bits)
    values = (x * scales.reciprocal()[:, None]).round_().clamp_(-limit, limit).to(torch.int32)
    return QuantizedOperand(values, scales)


def dequantize_result(
    values: torch.Tensor, scales: torch.Tensor, columns: torch.Tensor | None = None
) -> torch.Tensor:
    """y[t, j] = values[t, j]·scales[t]·columns[j]: integers [T, n] -> float32 [T, n]."""
    y = values.to(torch.float32) * scales[:, None]
    return y if columns is None else y.mul_(columns)
