"""Bounded staleness: which update a micro-batch belongs to, when it may start, and when the update is made.

Updates are numbered u = 0, 1, … and made in this order. Each consists of B consecutive micro-batches, in the
order in which they are drawn, and is made once all of them have finished, in whatever order they do. A
micro-batch of update u that starts when v updates have been made is computed at the adapter after those; its
staleness is u − v. It may start if

    u − v ≤ N(u)

- *Bound.* Update u is made after exactly u others, so the staleness of its micro-batches is u − v, known and
  bounded from their start on. That is what weight prediction needs to know.
- *Progress.* The earliest update that has not been made has u = v, so its micro-batches may always start. As
  all of them finish, it is made in the end: nothing is thrown away, and nothing waits for ever.
- *Lock step.* With N = 0 all micro-batches of an update start from the same adapter, v = u.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class Entry(Generic[T]):
    """A micro-batch that has started: its staleness, and its result once there is one."""

    staleness: int
    result: T | None = None


class UpdateQueue(Generic[T]):
    """The updates that have begun and are not made, in their order. Not thread-safe.

    Args:
        version: updates that have been made already.
        width: micro-batches of an update, B.
        bound: N(u), at least 0.
    """

    def __init__(self, version: int, width: int, bound: Callable[[int], int]) -> None:
        self._version, self._width, self._bound = version, width, bound
        self._pending: deque[list[Entry[T]]] = deque()

    @property
    def is_empty(self) -> bool:
        """Whether all updates that have begun are made."""
        return not self._pending

    @property
    def is_between_updates(self) -> bool:
        """Whether the next micro-batch would begin an update."""
        return not self._pending or len(self._pending[-1]) == self._width

    @property
    def can_start(self) -> bool:
        """Whether one more micro-batch keeps the bound if it starts now."""
        staleness = self._next_staleness
        return staleness <= self._bound(self._version + staleness)

    def start(self) -> Entry[T]:
        """Records that a micro-batch starts now. Only while `can_start`."""
        entry: Entry[T] = Entry(self._next_staleness)
        if self.is_between_updates:
            self._pending.append([])
        self._pending[-1].append(entry)
        return entry

    def take(self, *, is_drained: bool) -> tuple[T, ...]:
        """The results of the update to make now, in the order of their starts; none while it must wait.

        Args:
            is_drained: there are no more micro-batches, so that the last update may have fewer.
        """
        if not self._pending:
            return ()
        first = self._pending[0]
        is_whole = len(first) == self._width or (is_drained and len(self._pending) == 1)
        results = tuple(entry.result for entry in first if entry.result is not None)
        if not is_whole or len(results) < len(first):
            return ()
        self._pending.popleft()
        self._version += 1
        return results

    @property
    def _next_staleness(self) -> int:
        return len(self._pending) - (0 if self.is_between_updates else 1)
