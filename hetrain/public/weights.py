"""Quantisation of public weights to int8, one scale per output channel.

One int8 matrix serves both directions: with W ≈ diag(s)·Q, y = x·Wᵀ = (x·Qᵀ)·diag(s) and
dx = g·W = (g·diag(s))·Q, so the client multiplies y after decryption, and g before encryption, by s.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from hetrain.public.errors import ModelError


@dataclass(frozen=True)
class QuantisedMatrix:
    """Q = round(W / s): int8 values [out, in] in -127..127 and float32 scales s [out]."""

    values: torch.Tensor
    scales: torch.Tensor


def quantise(weight: torch.Tensor) -> QuantisedMatrix:
    """Symmetric int8 quantisation per output channel: s_j = max_k |W[j,k]| / 127, Q = round(W / s).

    Args:
        weight: floating-point matrix [out, in]; computed in float32, so client and worker agree to the bit.

    Returns:
        The quantised matrix; a channel of zeros gets scale 1.

    Raises:
        ModelError: the matrix has a NaN or an infinity.
    """
    w = weight.detach().to(torch.float32)
    scales = w.abs().amax(dim=1) / 127.0
    if not bool(torch.isfinite(scales).all()):
        raise ModelError("the weights are not finite", hint="the checkpoint is damaged: download it again")
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    values = torch.div(w, scales[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return QuantisedMatrix(values.contiguous(), scales)


def max_l1(values: torch.Tensor) -> tuple[int, int]:
    """(max_j ‖Q_j,:‖₁, max_k ‖Q_:,k‖₁): what bounds a forward and a backward product of int8 matrix Q."""
    magnitudes = values.to(torch.int16).abs()
    rows = magnitudes.sum(dim=1, dtype=torch.int64).amax()
    columns = magnitudes.sum(dim=0, dtype=torch.int64).amax()
    return int(rows), int(columns)


def matrix_digest(values: torch.Tensor) -> str:
    """SHA-256 over shape and bytes of an int8 matrix, in hexadecimal."""
    hasher = hashlib.sha256(repr(tuple(values.shape)).encode())
    hasher.update(values.contiguous().numpy().data.cast("B"))
    return hasher.hexdigest()
