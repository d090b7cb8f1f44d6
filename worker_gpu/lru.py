"""Values that are dear to make, kept within a limit."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

V = TypeVar("V")


def _one(_: object) -> int:
    return 1


class Cache(Generic[V]):
    """Values by name; when they cost more than `limit` together, the least recently used goes first.

    Who holds a value may go on using it when it has gone. Thread-safe: a value is made by one thread while
    others that want the same wait, and nobody else does.

    Args:
        limit: what all values may cost together; None for no limit.
        cost: what a value costs; by default each counts as one.
    """

    def __init__(self, limit: int | None = None, cost: Callable[[V], int] = _one) -> None:
        self._limit = limit
        self._cost = cost
        self._values: OrderedDict[str, V] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()
        # A lock lives as long as somebody makes that value or waits for it.
        self._makers: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    @property
    def total(self) -> int:
        """What the values cost together."""
        return self._total

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def has_room(self, cost: int) -> bool:
        """Whether something that costs so much would fit in without another one going."""
        return self._limit is None or self._total + cost <= self._limit

    def get(self, name: str, make: Callable[[], V]) -> V:
        """The value called `name`, made now if it is not there. Raises what `make` raises."""
        with self._maker(name):
            value = self._find(name)
            if value is None:
                value = make()
                self._keep(name, value)
            return value

    def _maker(self, name: str) -> threading.Lock:
        with self._lock:
            return self._makers.setdefault(name, threading.Lock())

    def _find(self, name: str) -> V | None:
        with self._lock:
            if name in self._values:
                self._values.move_to_end(name)
            return self._values.get(name)

    def _keep(self, name: str, value: V) -> None:
        cost = self._cost(value)
        if self._limit is not None and cost > self._limit:
            return
        with self._lock:
            self._values[name] = value
            self._total += cost
            while self._limit is not None and self._total > self._limit:
                _, oldest = self._values.popitem(last=False)
                self._total -= self._cost(oldest)
