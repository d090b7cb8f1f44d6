"""A cache of values that are costly to make, with a limit on their total cost."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

V = TypeVar("V")


def _unit_cost(_: object) -> int:
    return 1


class LruCache(Generic[V]):
    """Values by name. When their total cost exceeds `limit`, the least recently used are dropped.

    A dropped value stays valid for its users. Thread-safe: one thread makes a value, and others
    wait for it only if they ask for the same one.

    Args:
        limit: the total cost of all values; None for no limit.
        cost: the cost of a value; 1 by default.
    """

    def __init__(self, limit: int | None = None, cost: Callable[[V], int] = _unit_cost) -> None:
        self._limit = limit
        self._cost = cost
        self._values: OrderedDict[str, V] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()
        # A lock lives while a thread makes that value or waits for it.
        self._key_locks: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    @property
    def total(self) -> int:
        """The total cost of the values."""
        return self._total

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def fits(self, cost: int) -> bool:
        """Whether a value of this cost can be added without dropping another one."""
        return self._limit is None or self._total + cost <= self._limit

    def get(self, name: str, make: Callable[[], V]) -> V:
        """The value called `name`, made now if it is absent. Raises what `make` raises."""
        with self._key_lock(name):
            value = self._find(name)
            if value is None:
                value = make()
                self._add(name, value)
            return value

    def _key_lock(self, name: str) -> threading.Lock:
        with self._lock:
            return self._key_locks.setdefault(name, threading.Lock())

    def _find(self, name: str) -> V | None:
        with self._lock:
            if name in self._values:
                self._values.move_to_end(name)
            return self._values.get(name)

    def _add(self, name: str, value: V) -> None:
        cost = self._cost(value)
        if self._limit is not None and cost > self._limit:
            return
        with self._lock:
            self._values[name] = value
            self._total += cost
            while self._limit is not None and self._total > self._limit:
                _, oldest = self._values.popitem(last=False)
                self._total -= self._cost(oldest)
