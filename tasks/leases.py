"""Leases: keys that say which requests this process is running, renewed by one thread until it dies."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import sleep

import redis

from hetrain.public.broker.connection import FULL_S, broker_errors, while_full
from hetrain.public.protocol.keys import LEASE_RENEWAL_S, LEASE_TTL_MS

logger = logging.getLogger(__name__)


class Leases:
    """Keeps lease keys alive while their requests run. Thread-safe.

    Args:
        url: the broker's address.
        client: a client of it.
        owner: the value of the keys.
    """

    def __init__(self, url: str, client: redis.Redis, owner: str) -> None:
        self._url = url
        self._client = client
        self._owner = owner
        self._held: set[str] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @contextmanager
    def held(self, key: str) -> Iterator[bool]:
        """Takes a lease and renews it for the length of a block; yields False when somebody holds it already.

        The key itself goes with the report of the request's end, or runs out. Raises `BrokerError`.
        """
        if not while_full(lambda: self._take(key), limit_s=FULL_S):
            yield False
            return
        with self._lock:
            self._held.add(key)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._renew, name="hetrain-leases", daemon=True)
                self._thread.start()
        try:
            yield True
        finally:
            with self._lock:
                self._held.discard(key)

    def _take(self, key: str) -> bool:
        with broker_errors(self._url):
            return bool(self._client.set(key, self._owner, nx=True, px=LEASE_TTL_MS))

    def _renew(self) -> None:
        while True:
            sleep(LEASE_RENEWAL_S)
            # Under the lock: a lease must not come back after its request has ended.
            with self._lock:
                try:
                    # PEXPIRE works also while the broker is out of memory, so these are renewed first.
                    lost = [key for key in self._held if not self._client.pexpire(key, LEASE_TTL_MS)]
                    for key in lost:
                        self._client.set(key, self._owner, px=LEASE_TTL_MS)
                except redis.RedisError as error:
                    logger.warning("leases could not be renewed: %s", error)
