"""Leases: keys that name the requests that this process runs, renewed by one thread until it dies."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from time import sleep

import redis

from hetrain.public.protocol.keys import LEASE_RENEWAL_S, LEASE_TTL_MS

logger = logging.getLogger(__name__)


class Leases:
    """Keeps lease keys alive while their requests run. Thread-safe.

    `RequestLog.begin` takes a lease, `RequestLog.end` gives it back; what neither does, runs out.

    Args:
        client: a client of the broker.
        owner: the value of the keys.
    """

    def __init__(self, client: redis.Redis, owner: str) -> None:
        self._client = client
        self._owner = owner
        self._held: set[str] = set()
        self._ending: set[str] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @contextmanager
    def renewed(self, key: str) -> Iterator[Callable[[], None]]:
        """Renews a lease for the length of a block.

        Yields:
            A function to call before the request's end is reported. From then on the lease is prolonged, but
            not set again where it is missing: a lease must not come back after its request has ended.
        """
        with self._lock:
            self._held.add(key)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._renew, name="hetrain-leases", daemon=True)
                self._thread.start()
        try:
            yield partial(self._end, key)
        finally:
            with self._lock:
                self._held.discard(key)
                self._ending.discard(key)

    def _end(self, key: str) -> None:
        with self._lock:
            self._ending.add(key)

    def _renew(self) -> None:
        while True:
            sleep(LEASE_RENEWAL_S)
            try:
                self._renew_once()
            except redis.RedisError as error:
                logger.warning("leases could not be renewed: %s", error)

    def _renew_once(self) -> None:
        with self._lock:
            held = list(self._held)
        if not held:
            return
        pipe = self._client.pipeline(transaction=False)
        for key in held:
            pipe.pexpire(key, LEASE_TTL_MS)  # works also while the broker is out of memory
        missing = [key for key, renewed in zip(held, pipe.execute(), strict=True) if not renewed]
        if missing:
            with self._lock:  # over the network, but only after the broker has lost a key
                for key in set(missing) & self._held - self._ending:
                    self._client.set(key, self._owner, px=LEASE_TTL_MS)
