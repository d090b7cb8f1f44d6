"""The position of a run in its data: the micro-batches that have moved the adapter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """The micro-batches whose gradients have been applied: all below `low`, and the few in `beyond`.

    Asynchronous updates overtake one another, so the applied ones need not be a prefix of the data.
    """

    low: int = 0
    beyond: frozenset[int] = frozenset()

    def __contains__(self, index: int) -> bool:
        return index < self.low or index in self.beyond

    def after(self, indices: Iterable[int]) -> Position:
        """The position once micro-batches `indices` have been applied too."""
        low, beyond = self.low, self.beyond.union(indices)
        while low in beyond:
            low += 1
        return Position(low, frozenset(index for index in beyond if index >= low))
