"""Quantisation of public weights to int8, with one scale per output and one per input channel.

One int8 matrix serves both directions: with W ≈ diag(s)·Q·diag(c),

    y  = x·Wᵀ = ((x·diag(c))·Qᵀ)·diag(s)          dx = g·W = ((g·diag(s))·Q)·diag(c)

so the client multiplies by s and c before encryption and after decryption, and workers see Q alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.nn.functional import hardshrink

from hetrain.public.errors import ModelError

_BALANCING_ROUNDS = 4
_BLOCK_VALUES = 1 << 22
_TILE = 1024
_SMALLEST = 2.0**-64


@dataclass(frozen=True)
class Scales:
    """s [out] and c [in], float32, of W ≈ diag(s)·Q·diag(c)."""

    outputs: torch.Tensor
    inputs: torch.Tensor

    @property
    def transposed(self) -> Scales:
        """Those of Wᵀ."""
        return Scales(outputs=self.inputs, inputs=self.outputs)


@dataclass(frozen=True)
class QuantizedMatrix:
    """Q, int8 [out, in] in -127..127, and its scales."""

    values: torch.Tensor
    scales: Scales


def quantize(weight: torch.Tensor) -> QuantizedMatrix:
    """Symmetric int8 quantisation: c = `input_scales`, s_j = max_k |W[j,k]/c_k| / 127, Q = round(W / (s·c)).

    Args:
        weight: floating-point matrix [out, in]; computed in float32, so client and worker agree to the bit.
            Magnitudes up to 2^-64 count as zero: not every process takes denormal numbers for zero.

    Returns:
        The quantised matrix; a channel of zeros gets scale 1.

    Raises:
        ModelError: the matrix has a NaN or an infinity.
    """
    weight = weight.detach()
    inputs = input_scales(weight)
    values, outputs = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight))
    for rows in _blocks(weight):
        balanced = _as_float32(weight[rows]) / inputs
        largest = balanced.abs().amax(dim=1) / 127.0
        if not bool(torch.isfinite(largest).all()):
            raise ModelError(
                "the weights are not finite", hint="the checkpoint is damaged: download it again"
            )
        outputs[rows] = _positive(largest)
        values[rows] = balanced.div_(outputs[rows, None]).round_().clamp_(-127, 127)
    return QuantizedMatrix(values, Scales(outputs, inputs))


def _blocks(weight: torch.Tensor) -> Iterator[slice]:
    """Row ranges whose float64 copies take 32 MB: a large matrix is not copied as a whole."""
    step = max(1, _BLOCK_VALUES // weight.shape[1])
    return (slice(start, start + step) for start in range(0, len(weight), step))


def _as_float32(block: torch.Tensor) -> torch.Tensor:
    return hardshrink(block.to(torch.float32), _SMALLEST)


def input_scales(weight: torch.Tensor) -> torch.Tensor:
    """c [in], float32: with row scales r, the mean over j of |W[j,k]| / (r_j·c_k) is about alike for all k.

    Large weights sit in few columns, and cost all others of their row their precision. Alternating
    normalisation (Sinkhorn) of mean magnitudes evens them out, as SINQ (arXiv 2509.22944) does with standard
    deviations. c is rounded to bfloat16: sums differ between machines in their last bits, c must not.

    Args:
        weight: as of `quantize`.
    """
    rows, columns = weight.shape
    c = torch.ones(columns, dtype=torch.float64)
    for _ in range(_BALANCING_ROUNDS):
        sums = torch.zeros(columns, dtype=torch.float64)
        for block in _blocks(weight):
            magnitudes = _as_float32(weight[block]).abs_().to(torch.float64)
            r = _positive(magnitudes @ (1 / c))
            sums += (1 / r) @ magnitudes
        c = _positive(sums * (columns / rows))
    c = c / c.log().mean().exp()
    return c.to(torch.bfloat16).to(torch.float32)


def _positive(values: torch.Tensor) -> torch.Tensor:
    """1 in place of what cannot be divided by: channels of zeros."""
    return torch.where(values > 0, values, torch.ones_like(values))


class Norms(BaseModel):
    """What bounds a product with an int8 matrix: max_j ‖W_j‖₁, and `squares`, max_j ‖W_j‖₂²."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    l1: Annotated[int, Field(ge=0)]
    squares: Annotated[int, Field(ge=0)]


def norms_of(values: torch.Tensor) -> tuple[Norms, Norms]:
    """The norms of an int8 matrix Q and of Qᵀ. Sums within a tile stay below 2^24: exact in float32."""
    rows, columns = (torch.zeros(2, size, dtype=torch.float64) for size in values.shape)
    for top in range(0, len(values), _TILE):
        for left in range(0, values.shape[1], _TILE):
            tile = values[top : top + _TILE, left : left + _TILE].to(torch.float32)
            sizes = torch.stack((tile.abs(), tile.square()))
            rows[:, top : top + _TILE] += sizes @ torch.ones(tile.shape[1])
            columns[:, left : left + _TILE] += torch.ones(tile.shape[0]) @ sizes
    of_rows, of_columns = (
        Norms(l1=int(l1), squares=int(squares)) for l1, squares in (rows.amax(dim=1), columns.amax(dim=1))
    )
    return of_rows, of_columns


def matrix_digest(values: torch.Tensor) -> str:
    """SHA-256 over shape and bytes of an int8 matrix, in hexadecimal."""
    hasher = hashlib.sha256(repr(tuple(values.shape)).encode())
    hasher.update(values.contiguous().numpy().data.cast("B"))
    return hasher.hexdigest()
