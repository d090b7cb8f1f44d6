"""Layout of operands and results of `rlwe`: sizes, dropped bits, and the order of a result's planes.

up      b     int32 [K, N]
down    b'    int16 [n, N]        bits 16 to 31
        a'    int16 [n, d·N]      bits 16 to 31, without a hint only
              uint8 [n, d·N]      bits 8 to 15
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from hetrain.public.errors import ParameterError, WireError
from hetrain.public.lattice.parameters import MODULUS_BITS, SLOTS, ParameterSet

B_SHIFT, A_SHIFT = 16, 8
"""Low bits of b' and of a' that a worker drops, rounding to nearest."""

Plane = tuple[torch.dtype, int]
"""Type and width of a matrix of n rows, which lie one after the other."""


def mask_planes(dimension: int) -> tuple[Plane, Plane]:
    """The planes of a': its high 16 bits, then its low 8."""
    return (torch.int16, dimension), (torch.uint8, dimension)


def row_bytes(planes: Sequence[Plane]) -> int:
    """Bytes of one row of all planes together."""
    return sum(dtype.itemsize * width for dtype, width in planes)


HINT_PLANES = mask_planes(SLOTS)


@dataclass(frozen=True)
class ResultFormat:
    """The layout of operands and results under one parameter set.

    Attributes:
        parameters: N and d.
        has_mask_product: whether a' = W·a travels beside b' = W·b.
    """

    parameters: ParameterSet
    has_mask_product: bool

    @property
    def planes(self) -> tuple[Plane, ...]:
        """In the order in which they travel."""
        b = (torch.int16, self.parameters.ring_degree)
        return (b, *mask_planes(self.parameters.dimension)) if self.has_mask_product else (b,)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of a result."""
        return row_bytes(self.planes)

    def operand_bytes(self, k: int) -> int:
        """Bytes of an operand of k features."""
        return 4 * k * self.parameters.ring_degree

    def read_operand(self, payload: memoryview, k: int, *, where: str) -> torch.Tensor:
        """b, int32 [k, N]. Raises `WireError` unless the payload has as many bytes."""
        expected = self.operand_bytes(k)
        if payload.nbytes != expected:
            raise WireError(f"the operand has {payload.nbytes} bytes, not {expected}", where=where)
        return torch.frombuffer(payload, dtype=torch.int32).view(k, -1)

    def read_result(self, data: memoryview, n: int) -> list[torch.Tensor]:
        """The planes of n rows. Raises `WireError` unless the data has as many bytes."""
        expected = n * self.row_bytes
        if data.nbytes != expected:
            raise WireError(f"a result of {n} rows has {data.nbytes} bytes, not {expected}")
        return list(_split(data, n, self.planes))


def _split(data: memoryview, n: int, planes: Sequence[Plane]) -> Iterator[torch.Tensor]:
    start = 0
    for dtype, width in planes:
        stop = start + n * width * dtype.itemsize
        yield torch.frombuffer(data[start:stop], dtype=dtype).view(n, width)
        start = stop


def join_planes(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """a'·2^8 modulo 2^32 from its high 16 bits (int16) and its low 8 (uint8): int32 of the same shape."""
    return (high.to(torch.int32) << 16) | (low.to(torch.int32) << A_SHIFT)


def switching_error_bound(parameters: ParameterSet) -> int:
    """Largest |error| that dropping low result bits can add: 2^15 from b', 2^7·‖s‖₁ ≤ 2^7·n from a'·s."""
    return (1 << (B_SHIFT - 1)) + (1 << (A_SHIFT - 1)) * parameters.dimension


def largest_operand(parameters: ParameterSet, max_l1: int) -> int:
    """x_max: the largest |x| for which W·x never wraps modulo 2^32.

    |Σ_k W[j,k]·(x_k + e_k)| ≤ (x_max + eta)·‖W_j‖₁, so x_max is the largest integer with
    (x_max + eta)·max_j ‖W_j‖₁ + switching error < 2^31.

    Args:
        parameters: gives eta and the switching error.
        max_l1: max_j ‖W_j‖₁ of the int8 matrix.

    Raises:
        ParameterError: the matrix is so large that fewer than 8 bits would be left.
    """
    room = (1 << (MODULUS_BITS - 1)) - 1 - switching_error_bound(parameters)
    x_max = room // max(max_l1, 1) - parameters.eta
    if x_max < 127:
        raise ParameterError(
            f"a matrix with max ‖W_j‖₁ = {max_l1} leaves only {x_max} levels for its operand",
            hint="keep this module on the client",
        )
    # Zero or tiny matrices would admit operands wider than the modulus; 2^24 levels are exact in float32.
    return min(x_max, 1 << 24)
