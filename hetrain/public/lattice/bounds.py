"""How large an operand may be, so that no product with a public matrix ever wraps modulo q.

With integers m for one token, |Σ_k W[j,k]·m_k| ≤ ‖W_j‖₁·‖m‖∞ and, by Cauchy and Schwarz, ≤ ‖W_j‖₂·‖m‖₂. The
errors of encryption and of both roundings are bounded by the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hetrain.public.errors import ParameterError
from hetrain.public.lattice.parameters import ETA
from hetrain.public.lattice.ring import DROPPED_BITS, MODULUS, RESULT_BITS
from hetrain.public.model.quantization import Norms

LARGEST_ENTRY = 0x7F7F7F
"""The largest integer of three signed 8-bit digits."""
MIN_LEVELS = 127
OPERAND_ERROR = ETA + (1 << (DROPPED_BITS - 1))
"""Largest |error| of an encrypted entry: noise, and rounding to multiples of 2^6."""
RESULT_ERROR = MODULUS / (1 << (RESULT_BITS + 1)) + 1
"""Largest |error| of an honest result: rounding to multiples of q/2^14, and to integers."""
DEVIATIONS = 9
"""Standard deviations of an honest sum of rounding errors that verification lets pass."""


@dataclass(frozen=True)
class OperandBound:
    """No product wraps if, for every token, ‖m‖∞ ≤ `largest` or ‖m‖₂ ≤ `norm`; and ‖m‖∞ ≤ `LARGEST_ENTRY`."""

    largest: int
    norm: float


def accepted_error(rows: int) -> float:
    """Largest |error| of a result of so many rows that passes verification, unless with the stated chance.

    Twice the tolerance 9·√(‖r‖₁/12) in steps of q/2^14, for the largest ‖r‖₁ ≤ rows.
    """
    return 2 * DEVIATIONS * math.sqrt(rows / 12) * MODULUS / (1 << RESULT_BITS)


def noise_bound(norms: Norms, rows: int) -> float:
    """The largest |error| of a result of so many rows: noise, roundings and what verification accepts."""
    return OPERAND_ERROR * norms.l1 + RESULT_ERROR + accepted_error(rows)


def operand_bound(norms: Norms, rows: int) -> OperandBound:
    """The bound for a matrix of so many rows W_j: no result that passes verification has wrapped.

        max_j ‖W_j‖·(that of m) + `OPERAND_ERROR`·max_j ‖W_j‖₁ + `RESULT_ERROR` + `accepted_error` ≤ q/2

    Raises:
        ParameterError: the matrix is so large that fewer than 8 bits would be left.
    """
    room = MODULUS / 2 - noise_bound(norms, rows)
    largest = int(room // max(norms.l1, 1))
    if largest < MIN_LEVELS:
        raise ParameterError(
            f"a matrix with max ‖W_j‖₁ = {norms.l1} leaves only {largest} levels for its operand",
            hint="keep this module on the client",
        )
    return OperandBound(largest, room / math.sqrt(max(norms.squares, 1)))
