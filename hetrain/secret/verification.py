"""Checking a product with a public matrix without holding the matrix.

For P = W·X modulo 2^32 and secret random rows R over {-1, 0, 1}:  R·P = (R·W)·X.  The client computes R·W
once, while the matrix streams by, and keeps only that (Freivalds' check; rule 7 of docs/security.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hetrain.secret.randomness import SecretStream, sample_ternary

CHECK_ROWS = 64
"""A wrong product passes one row with probability at most 1/2: all of them with at most 2^-64."""
_BLOCK_COLUMNS = 256
_DEVIATIONS = 8
_EXACT_FLOAT32 = 1 << 24


@dataclass(frozen=True, repr=False)
class Sketch:
    """R, int8 [64, n], and R·W, int32 [64, K]. R is secret: with it a worker could pass wrong products."""

    rows: torch.Tensor
    image: torch.Tensor

    @staticmethod
    def of(matrix: torch.Tensor) -> Sketch:
        """Fresh rows R, and R·W for the int8 matrix W [n, K]."""
        n, k = matrix.shape
        rows = sample_ternary(SecretStream("hetrain.check"), CHECK_ROWS * n).view(CHECK_ROWS, n)
        dtype = torch.float32 if 128 * n < _EXACT_FLOAT32 else torch.float64
        image = torch.empty(CHECK_ROWS, k, dtype=torch.int32)
        left = rows.to(dtype)
        for start in range(0, k, _BLOCK_COLUMNS):
            columns = slice(start, start + _BLOCK_COLUMNS)
            image[:, columns] = (left @ matrix[:, columns].to(dtype)).to(torch.int32)
        return Sketch(rows, image)

    def largest_error(self, product: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
        """max |R·P − (R·W)·X| for each row of R, differences modulo 2^32 and signed: int64 [64].

        Exact: every sum below stays under 2^53.

        Args:
            product: P, int32 [n, M], as claimed; n < 2^21.
            operand: X, int32 [K, M]; n·K < 2^29.
        """
        rows, image = self.rows.to(torch.float64), self.image.to(torch.float64)
        worst = torch.zeros(CHECK_ROWS, dtype=torch.int64)
        for start in range(0, product.shape[1], _BLOCK_COLUMNS):
            columns = slice(start, start + _BLOCK_COLUMNS)
            claimed = _exact(rows, product[:, columns])
            x = operand[:, columns]
            expected = (_exact(image, x >> 16) << 16) + _exact(image, x & 0xFFFF)
            difference = claimed - expected
            signed = ((difference + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)
            worst = torch.maximum(worst, signed.abs().amax(dim=1))
        return worst

    def accepts(self, product: torch.Tensor, operand: torch.Tensor, rounding: int) -> bool:
        """Whether P is W·X up to rounding errors, uniform and independent within ±`rounding`.

        For each row r their sum has the standard deviation rounding·√(‖r‖₁/3). Eight of them are let pass: a
        right product is refused less than once in 10^9 matrices.
        """
        tolerance = _DEVIATIONS * rounding * (self.rows.to(torch.float64).abs().sum(dim=1) / 3).sqrt()
        return bool((self.largest_error(product, operand) <= tolerance).all())


def _exact(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = (left @ right.to(torch.float64)).to(torch.int64)
    return product
