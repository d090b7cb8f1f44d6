"""Back pressure: how many bytes of a job may lie in the broker at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from hetrain.public.errors import BrokerFull, HetrainError, UsageError

DEFAULT_BYTES = 1 << 30
"""The limit where the broker has no maxmemory, or does not report it."""

_SHARE = 2  # of the broker's memory; the rest is for queues, leases, buffers, and what is stored twice


def share_of(maxmemory: int | None) -> int:
    """Half of the broker's memory; `DEFAULT_BYTES` where that has no limit or is not known."""
    return maxmemory // _SHARE if maxmemory else DEFAULT_BYTES


class ByteBudget:
    """A counting semaphore in bytes, fair: threads are served in the order in which they ask.

    No thread waits for ever. It asks once for all that a product needs and asks for no more until it has
    given that back, so a thread that holds bytes waits for workers alone; and the first in line is served as
    soon as nothing is held at all, however much it asks for.

    Args:
        limit: bytes that may be held at once.
        strict: whether a request of more than `limit` is refused. Otherwise it waits until it is alone.
        capacity: bytes that the broker can hold at all; None for no known limit.
    """

    def __init__(self, limit: int, *, strict: bool, capacity: int | None = None) -> None:
        self._limit, self._strict, self._capacity = limit, strict, capacity
        self._held: list[int] = []
        self._line: deque[object] = deque()
        self._changed = threading.Condition()
        self._end: HetrainError | None = None

    @property
    def held(self) -> tuple[int, ...]:
        """Bytes that are held, one number for each `acquire`."""
        with self._changed:
            return tuple(self._held)

    @property
    def n_waiting(self) -> int:
        """How many threads wait in `acquire`."""
        return len(self._line)

    def require(self, nbytes: int) -> None:
        """Refuses what can never be held.

        Raises:
            UsageError: it is more than the limit, and the budget is strict.
            BrokerFull: it is more than the broker can hold.
        """
        if self._strict and nbytes > self._limit:
            raise UsageError(
                f"one product and its operand take {nbytes / 1e6:.0f} MB, "
                f"more than the {self._limit / 1e6:.0f} MB that may be in flight",
                field="max_bytes_in_flight",
                hint="raise it, or lower `micro_batch_tokens`",
            )
        if self._capacity and nbytes > self._capacity:
            raise BrokerFull(
                f"one product and its operand take {nbytes / 1e6:.0f} MB, "
                f"more than the {self._capacity / 1e6:.0f} MB that the broker can hold (maxmemory)",
                hint="raise its maxmemory, or lower `micro_batch_tokens`",
            )

    def acquire(self, nbytes: int) -> None:
        """Waits until `nbytes` more may be held, and holds them.

        Raises:
            UsageError: as `require`.
            BrokerFull: as `require`.
            HetrainError: what the budget was closed with.
        """
        self.require(nbytes)
        ticket = object()
        with self._changed:
            self._line.append(ticket)
            try:
                self._changed.wait_for(
                    lambda: self._end is not None or (self._line[0] is ticket and self._has_room(nbytes))
                )
                if self._end is not None:
                    raise self._end
                self._held.append(nbytes)
            finally:
                self._line.remove(ticket)
                self._changed.notify_all()

    def release(self, nbytes: int) -> None:
        """Gives back what `acquire` took."""
        with self._changed:
            self._held.remove(nbytes)
            self._changed.notify_all()

    @contextmanager
    def reserved(self, nbytes: int) -> Iterator[None]:
        """Holds `nbytes` for a block. Raises as `acquire`."""
        self.acquire(nbytes)
        try:
            yield
        finally:
            self.release(nbytes)

    def close(self, reason: HetrainError) -> None:
        """Has `acquire` raise `reason`, in the threads that wait now and in all that come."""
        with self._changed:
            self._end = self._end or reason
            self._changed.notify_all()

    def _has_room(self, nbytes: int) -> bool:
        return not self._held or sum(self._held) + nbytes <= self._limit
