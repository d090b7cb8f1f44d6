"""The results of one product, from arrival to verdict: complete, verified as a whole, each liar named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from hetrain.public.errors import ResultRejected, WireError
from hetrain.public.protocol.product import Part, Product, RowRange

R = TypeVar("R")
C = TypeVar("C")

Weights = Callable[[Product], torch.Tensor]
"""Loads W, int8 [n, K], of a product: only when several workers' results do not add up."""


class Claim(Protocol[C, R]):
    """What results of a product must be, for an operand that is known. Holds no key."""

    def read(self, part: Part) -> R:
        """A part as numbers. Raises `WireError` when its length is not that of its rows."""
        ...

    def rows(self) -> C:
        """Rows for one verification of the whole product, drawn now."""
        ...

    def rows_for(self, matrix: torch.Tensor) -> C:
        """New rows for a range of W, int8 [rows, K]."""
        ...

    def holds(self, rows: C, results: Sequence[R]) -> bool:
        """Whether `results`, of adjacent ranges in order, agree with the rows."""
        ...


@dataclass(frozen=True)
class Verified(Generic[R]):
    """One range's numbers, which are right up to what the engine tolerates."""

    rows: RowRange
    values: R


class PartsCheck(Generic[C, R]):
    """Collects the parts of one product, and verifies them once they are complete. For one thread at a time.

    The product is verified as a whole: the ranges that workers get are not known in advance, so there are no
    images of rows restricted to them. Only where that fails and several workers took part, W is loaded, and
    each range is verified by itself.

    Args:
        product: which one.
        claim: what its results must be.
        weights: loads its matrix.
    """

    def __init__(self, product: Product, claim: Claim[C, R], weights: Weights) -> None:
        self._product = product
        self._claim = claim
        self._weights = weights
        self._parts: dict[RowRange, tuple[Part, R]] = {}
        self._is_verified = False

    def add(self, part: Part) -> None:
        """Takes one part, and gives the verdict with the last one: an `Accept` of `hetrain.transport`.

        Raises:
            ResultRejected: the part has another length than its rows take, or the product is wrong; `workers`
                are those whose parts are. Their parts are dropped.
        """
        self._is_verified = False
        try:
            self._parts[part.rows] = part, self._claim.read(part)
        except WireError as error:
            raise self._rejected({part.worker}, f"has another length: {error}") from error
        if sum(each.n for each, _ in self._parts.values()) < self._product.n:
            return
        wrong = self._wrong_workers()
        if wrong:
            self._parts = {rows: pair for rows, pair in self._parts.items() if pair[0].worker not in wrong}
            raise self._rejected(wrong, "is wrong")
        self._is_verified = True

    def results(self) -> list[Verified[R]]:
        """The verified ranges, in order. Raises `WireError` when the product was not verified."""
        if not self._is_verified:
            raise WireError(f"the result of {self._product} is not complete")
        return [Verified(rows, self._parts[rows][1]) for rows in sorted(self._parts)]

    def _rejected(self, workers: set[str], problem: str) -> ResultRejected:
        return ResultRejected(
            f"the result of {self._product} {problem}; it was not decrypted",
            where=", ".join(sorted(workers)),
            hint="do not use this worker: it, or the way to it, changes results",
            workers=tuple(sorted(workers)),
        )

    def _wrong_workers(self) -> set[str]:
        ordered = [self._parts[rows] for rows in sorted(self._parts)]
        if self._claim.holds(self._claim.rows(), [values for _, values in ordered]):
            return set()
        workers = {part.worker for part, _ in ordered}
        if len(workers) == 1:
            return workers
        matrix = self._weights(self._product)
        return {
            part.worker
            for part, values in ordered
            if not self._claim.holds(self._claim.rows_for(matrix[slice(*part.rows)]), [values])
        }
