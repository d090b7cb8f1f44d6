"""Activations and gradients as integers, one scale per token: the largest entry uses the whole range."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hetrain.public.errors import NotFinite


@dataclass(frozen=True)
class QuantisedOperand:
    """x[t, k] ≈ scales[t]·values[k, t]; values int32 [K, T], |values| ≤ x_max; scales float32 [T]."""

    values: torch.Tensor
    scales: torch.Tensor


def limited(x_max: int, bits: int | None) -> int:
    """The largest entry of an operand of at most `bits` signed bits: min(x_max, 2^(bits-1) - 1)."""
    return x_max if bits is None else min(x_max, (1 << (bits - 1)) - 1)


def quantise_operand(x: torch.Tensor, x_max: int) -> QuantisedOperand:
    """Per token t: scale_t = max_k |x[t,k]| / x_max, values = round(x / scale).

    Args:
        x: floating-point [T, K].
        x_max: largest integer allowed, from `hetrain.public.parameters.largest_operand`.

    Raises:
        NotFinite: x has a NaN or an infinity.
    """
    x = x.detach().to(device="cpu", dtype=torch.float32)
    largest = x.abs().amax(dim=1)
    if not bool(torch.isfinite(largest).all()):
        raise NotFinite(
            "the activations or gradients to encrypt are not finite",
            hint="training has diverged: lower --learning-rate or set --max-grad-norm",
        )
    # The inverse of a denormal scale would overflow; such a token is zero for every purpose.
    scales = (largest / x_max).clamp_min(torch.finfo(torch.float32).tiny)
    values = (x * scales.reciprocal()[:, None]).t().contiguous().round_().clamp_(-x_max, x_max)
    return QuantisedOperand(values.to(torch.int32), scales)


def dequantise_result(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """y[t, j] = scales[t]·values[j, t]: integers [n, T] -> float32 [T, n]."""
    return values.t().to(torch.float32) * scales[:, None]
