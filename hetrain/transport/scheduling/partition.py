"""How a product is cut into ranges of rows, so that several workers share it. Pure functions.

Every piece costs a task and a download of the whole operand, so a product is cut no finer than it takes to
keep all workers busy and to keep a slow one from holding it up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from hetrain.public.protocol.product import RowRange

MIN_ROWS = 64
MIN_PIECE_S = 0.005
MAX_PIECES = 256
PIECES_PER_SLOT = 4
_EVEN = 1.5
"""Workers whose slowest is within this factor of their mean are taken for equal: the rest is noise."""

Pace = tuple[int, float | None]
"""A worker's slots (tasks at once), and its measured work per second in each; None before it is measured."""


def partition(n_rows: int, pieces: int, step: int = 1) -> list[RowRange]:
    """Ranges of nearly equal length that partition ``0:n_rows``, in order; at most `pieces` of them.

    Args:
        n_rows: rows of the product, at least 1.
        pieces: how many ranges are wanted, at least 1.
        step: rows that an engine evaluates together. Every cut is at a multiple of ``step·⌈64/step⌉``, and no
            range is shorter than 64 rows unless the product is.
    """
    unit = step * -(-MIN_ROWS // step)
    # A last unit of fewer than 64 rows is no piece of its own.
    units = max(1, (n_rows + unit - MIN_ROWS) // unit)
    pieces = min(pieces, units)
    bounds = [unit * (units * i // pieces) for i in range(pieces)] + [n_rows]
    return list(pairwise(bounds))


def count_pieces(paces: Sequence[Pace], in_flight: float, work: float) -> int:
    """How many pieces of one product keep a fleet busy.

    With m products in flight, a fleet of rate R = Σ slots·rate completes one every m·work/R seconds: the fair
    time. There are at least slots/m pieces, and so many that the slowest worker of rate r needs no longer for
    one than the fair time: R/(r·m). Not more than 4 for each slot, and none of less than about 5 ms.

    Args:
        paces: of all workers that can take a piece.
        in_flight: products that share the fleet, this one included, at least 1.
        work: of the product, in the units of the rates.
    """
    if len(paces) < 2:
        return 1
    slots = sum(count for count, _ in paces)
    wanted = math.ceil(slots / in_flight)
    limit = min(PIECES_PER_SLOT * slots, MAX_PIECES)
    known = [rate for _, rate in paces if rate]
    if known:
        mean, slowest = sum(known) / len(known), min(known)
        if mean > _EVEN * slowest:
            total = sum(count * (rate or mean) for count, rate in paces)
            wanted = max(wanted, round(min(total / (slowest * in_flight), limit)))
        limit = min(limit, int(min(work / (mean * MIN_PIECE_S), limit)))
    return max(1, min(wanted, limit))
