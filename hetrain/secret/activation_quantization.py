"""Activations and gradients as integers, one scale per token: the largest entry uses the whole range."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hetrain.public.errors import NotFinite

_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class QuantizedOperand:
    """x[t, k] ≈ scales[t]·values[k, t]; values int32 [K, T], |values| ≤ x_max; scales float32 [T]."""

    values: torch.Tensor
    scales: torch.Tensor


def limited(x_max: int, bits: int | None) -> int:
    """The largest entry of an operand of at most `bits` signed bits: min(x_max, 2^(bits-1) - 1)."""
    return x_max if bits is None else min(x_max, (1 << (bits - 1)) - 1)


def token_scales(x: torch.Tensor, x_max: int) -> torch.Tensor:
    """scale_t = max_k |x[t,k]| / x_max: float32 [T].

    Args:
        x: float32 [T, K].
        x_max: largest integer allowed, from `hetrain.public.lattice.parameters.largest_operand`.

    Raises:
        NotFinite: x has a NaN or an infinity.
    """
    # Twenty times as fast as torch.linalg.vector_norm, and as aminmax, along rows.
    largest = torch.cat([rows.abs().amax(dim=1) for rows in torch.split(x, _ROWS_AT_ONCE)])
    if not bool(torch.isfinite(largest).all()):
        raise NotFinite(
            "the activations or gradients to encrypt are not finite",
            hint="training has diverged: lower `learning_rate` or set `max_grad_norm`",
        )
    # The inverse of a denormal scale would overflow; such a token is zero for every purpose.
    scales: torch.Tensor = (largest / x_max).clamp_min(torch.finfo(torch.float32).tiny)
    return scales


def rounded(x: torch.Tensor, inverse: torch.Tensor, x_max: int) -> torch.Tensor:
    """round(x[t, k]·inverse[t]), transposed: float32 [T, K] -> int32 [K, T], no entry beyond x_max."""
    return (x * inverse[:, None]).t().contiguous().round_().clamp_(-x_max, x_max).to(torch.int32)


def quantize_operand(x: torch.Tensor, x_max: int) -> QuantizedOperand:
    """Per token t: values = round(x / scale_t).

    Args:
        x: floating-point [T, K].
        x_max: as in `token_scales`.

    Raises:
        NotFinite: x has a NaN or an infinity.
    """
    x = x.detach().to(device="cpu", dtype=torch.float32)
    scales = token_scales(x, x_max)
    return QuantizedOperand(rounded(x, scales.reciprocal(), x_max), scales)


def dequantize_result(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """y[t, j] = scales[t]·values[j, t]: integers [n, T] -> float32 [T, n]."""
    return values.t().to(torch.float32) * scales[:, None]
