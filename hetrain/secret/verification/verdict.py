"""Whether claimed sums agree with what a public operand and secret rows imply. Pure functions.

Every argument is public, or derived from public values and the rows: no key, noise or message comes here, so
a verdict says nothing about them.
"""

from __future__ import annotations

import torch

from hetrain.public.lattice.bounds import DEVIATIONS
from hetrain.public.lattice.ring import DROPPED_BITS, MODULUS, RESULT_BITS


def tolerances(weights: torch.Tensor) -> torch.Tensor:
    """9·√(‖r‖₁/12) for every row, in units of the result.

    An honest result is off by rounding errors, uniform in ±1/2 and independent of r: their sum over a row's
    ‖r‖₁ entries has the variance ‖r‖₁/12. Among 2·10^6 products of 16 rows and 2048 coefficients fewer than
    2·10^-8 honest ones are expected to be refused.
    """
    return DEVIATIONS * (weights / 12).sqrt()


def is_near(expected: torch.Tensor, claimed: torch.Tensor, weights: torch.Tensor) -> bool:
    """Whether | 2^14/q·(r·W)·c − r·u | mod 2^14 stays within the tolerance, for every row and coefficient.

    Args:
        expected: (R·W)·c mod q, int32 [rows, N].
        claimed: R·u, integers [rows, N], of which the residues modulo 2^14 count.
        weights: ‖r‖₁, float64 [rows].
    """
    span = float(1 << RESULT_BITS)
    difference = expected.to(torch.float64) * (span / MODULUS) - claimed.to(torch.float64)
    off = (difference - span * (difference / span).round()).abs()
    return bool((off <= tolerances(weights)[:, None]).all())


def is_equal(expected: torch.Tensor, results: torch.Tensor, rows: torch.Tensor) -> bool:
    """Whether integers are exactly right: |y| ≤ q/2 and 2^6·y·r ≡ `expected` modulo q, for every row.

    Args:
        expected: 2^6·(R·W)·x mod q, int32 [rows, T].
        results: y, int32 [T, n], n < 2^21.
        rows: R, int8 [rows, n].
    """
    if int(results.max()) > MODULUS // 2 or int(results.min()) < -(MODULUS // 2):
        return False
    sums = (rows.to(torch.float64) @ results.to(torch.float64).t()).to(torch.int64) % MODULUS
    return bool(((sums << DROPPED_BITS) % MODULUS == expected).all())
