"""Rows that check a product with a public matrix without holding the matrix (Freivalds' check).

For P = X·Wᵀ and secret random rows r:  P·r = X·(r·W).  The client computes r·W while the matrix is at hand,
and keeps only that. The rows are secret: a worker that knew them could pass wrong products.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hetrain.public.lattice.ring import MODULUS
from hetrain.secret.randomness import SecretStream

KEPT_ROWS = 64
"""Rows of a product that a client keeps, from which it draws those of each verification."""
FIELD_ROWS = 3
_BLOCK_ROWS = 256
_EXACT_FLOAT32 = 1 << 24
_SYSTEM = secrets.SystemRandom()


@dataclass(frozen=True, repr=False)
class CheckRows:
    """R, int8 [rows, n], entries −1, 0, 0, 1 alike likely, and its image R·W, int32 [rows, K].

    A product with a wrong entry passes one row with probability at most 1/2. Over {−1, 0, 1} two entries
    wrong by half the modulus would pass with 5/9.
    """

    values: torch.Tensor
    image: torch.Tensor

    @staticmethod
    def fresh(matrix: torch.Tensor, count: int = KEPT_ROWS) -> CheckRows:
        """`count` new rows for the int8 matrix W [n, K]."""
        values = sample_rows(SecretStream("hetrain.check"), count * len(matrix)).view(count, -1)
        dtype = torch.float32 if 128 * len(matrix) < _EXACT_FLOAT32 else torch.float64
        return CheckRows(values, _image(values.to(dtype), matrix).to(torch.int32))

    def draw(self, count: int) -> CheckRows:
        """`count` of these rows, every choice alike likely."""
        chosen = torch.tensor(_SYSTEM.sample(range(len(self.values)), count))
        return CheckRows(self.values[chosen], self.image[chosen])

    @property
    def weights(self) -> torch.Tensor:
        """‖r‖₁ of every row, float64 [rows]."""
        return self.values.abs().sum(dim=1, dtype=torch.int64).to(torch.float64)


@dataclass(frozen=True, repr=False)
class FieldRows:
    """R, int64 [3, n], uniform over Z_q, and its image R·W mod q, int64 [3, K].

    A wrong product modulo q passes with probability q^-3 < 2^-89.
    """

    values: torch.Tensor
    image: torch.Tensor

    @staticmethod
    def fresh(matrix: torch.Tensor) -> FieldRows:
        """New rows for the int8 matrix W [n, K]."""
        values = sample_field(SecretStream("hetrain.field"), FIELD_ROWS * len(matrix)).view(FIELD_ROWS, -1)
        return FieldRows(values, field_product(values, lambda halves: _image(halves, matrix)))


def field_product(rows: torch.Tensor, multiply: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """rows·M mod q by halves of 15 bits, so that the sums of float64 stay below 2^53.

    Args:
        rows: int64 [r, k] in 0..q−1.
        multiply: halves·M, float64 [2·r, m], of float64 [2·r, k] in 0..2^15 − 1.

    Returns:
        int64 [r, m].
    """
    halves = torch.cat((rows >> 15, rows & 0x7FFF)).to(torch.float64)
    high, low = multiply(halves).to(torch.int64).chunk(2)
    return ((high % MODULUS << 15) + low) % MODULUS


def _image(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """rows·W in the floating-point type of `rows`, W int8 [n, K] by rows or transposed."""
    n, k = matrix.shape
    if matrix.is_contiguous():
        image = torch.zeros(len(rows), k, dtype=rows.dtype)
        for start in range(0, n, _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            image.addmm_(rows[:, block], matrix[block].to(rows.dtype))
        return image
    parts = [rows @ block.to(rows.dtype).t() for block in matrix.t().split(_BLOCK_ROWS)]
    return torch.cat(parts, dim=1)


def sample_rows(stream: SecretStream, count: int) -> torch.Tensor:
    """`count` independent values of {−1, 0, 0, 1}, int8: the difference of two bits."""
    keystream = stream.take(-(-count // 4))
    pairs = keystream[:, None] >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
    return ((pairs & 1).to(torch.int8) - ((pairs >> 1) & 1).to(torch.int8)).view(-1)[:count]


def sample_field(stream: SecretStream, count: int) -> torch.Tensor:
    """`count` independent uniform values of Z_q, int64: 30 bits each, those from q on rejected."""
    values = torch.empty(0, dtype=torch.int64)
    while values.numel() < count:
        words = stream.take(4 * (count + 64)).view(torch.int32).to(torch.int64) & ((1 << 30) - 1)
        values = torch.cat([values, words[words < MODULUS]])
    return values[:count]
