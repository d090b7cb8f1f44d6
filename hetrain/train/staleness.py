"""Bounded staleness: which finished micro-batch may move the adapter, and when another one may start.

A micro-batch that took its snapshot after v updates and is applied after u of them has staleness u − v. Let
the micro-batches that have started and are not yet applied be numbered k = 0, 1, … in the order in which they
started, the k-th with snapshot v_k. For a bound N the gate keeps this invariant after every event:

    u + k ≤ v_k + N   for all k

that is, even if all earlier ones are applied first, each keeps the bound. The three events preserve it:

- A start appends k = n with v_n = u to n others, so it is allowed if and only if n ≤ N.
- The r-th, once finished, is applied: u grows by one. Those after it move up by one, so for them nothing
  changes; each earlier one k < r must still satisfy u + 1 + k ≤ v_k + N, else the r-th waits. Its own
  staleness is u − v_r ≤ N − r.
- A finish changes neither u nor v.

The first has no earlier ones, so it never waits: every result is applied in the end, none is thrown away, and
the loop cannot lock up. Of several finished ones the first has the fewest conditions, so it alone is checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class Entry(Generic[T]):
    """A micro-batch that has started: the updates before its snapshot, and its result once there is one."""

    version: int
    result: T | None = None


class StalenessGate(Generic[T]):
    """The micro-batches that have started and are not applied, in the order of their starts. Not thread-safe.

    Args:
        max_staleness: the bound N, at least 0.
    """

    def __init__(self, max_staleness: int) -> None:
        self._bound = max_staleness
        self._version = 0
        self._unapplied: list[Entry[T]] = []

    @property
    def can_start(self) -> bool:
        """Whether one more micro-batch could keep the bound if it started now."""
        return len(self._unapplied) <= self._bound

    def start(self) -> Entry[T]:
        """Records that a micro-batch takes its snapshot now. Only while `can_start`."""
        entry: Entry[T] = Entry(self._version)
        self._unapplied.append(entry)
        return entry

    def finish(self, entry: Entry[T], result: T) -> None:
        """Records that a micro-batch has finished."""
        entry.result = result

    def take(self) -> T | None:
        """The result to apply now, counted as an update; None when all that have finished must wait."""
        for rank, entry in enumerate(self._unapplied):
            if entry.result is not None:
                del self._unapplied[rank]
                self._version += 1
                return entry.result
            if self._version + 1 + rank > entry.version + self._bound:
                return None  # applying a later one first would make this one too stale
        return None
