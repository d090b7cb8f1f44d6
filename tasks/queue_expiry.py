"""Lets queues expire from which no worker takes: whoever may send to one queue may name any.

Every worker looks now and then. It needs the right to list keys, and leaves things as they are without it.
"""

from __future__ import annotations

import logging
from time import monotonic

import redis
from redis.exceptions import NoPermissionError

from hetrain.public.errors import WireError
from hetrain.public.protocol.messages import QUEUE
from hetrain.public.protocol.registration import (
    MAX_WORKERS,
    REGISTRY_KEY,
    read_registration,
)

LOOK_S = 60.0
UNKNOWN_TTL_S = 900
_KEYS_AT_ONCE = 1000

logger = logging.getLogger(__name__)


class QueueExpiry:
    """Looks at the queues in the broker every `LOOK_S` seconds.

    Args:
        client: of the broker.
        queues: those of this worker.
    """

    def __init__(self, client: redis.Redis, queues: tuple[str, ...]) -> None:
        self._client = client
        self._own = queues
        self._due = 0.0

    def look_if_due(self) -> None:
        """Gives each queue that no registered worker names `UNKNOWN_TTL_S` seconds, others none.

        Lost tasks are sent again by their clients, once a worker is there.
        """
        now = monotonic()
        if now < self._due:
            return
        self._due = now + LOOK_S
        try:
            self._look()
        except NoPermissionError as error:
            logger.warning("queues without workers stay in the broker: %s", error)
            self._due = float("inf")
        except redis.RedisError as error:
            logger.info("could not look for queues without workers: %s", error)

    def _look(self) -> None:
        known = self._known()
        queues = list(self._client.scan_iter(f"{QUEUE}.*", count=_KEYS_AT_ONCE, _type="list"))
        pipe = self._client.pipeline(transaction=False)
        for queue in queues:
            if queue.decode(errors="replace") in known:
                pipe.persist(queue)
            else:
                pipe.expire(queue, UNKNOWN_TTL_S, nx=True)
        pipe.execute()

    def _known(self) -> set[str]:
        known = set(self._own)
        for member in self._client.zrange(REGISTRY_KEY, 0, MAX_WORKERS - 1):
            try:
                known.update(read_registration(member).queues)
            except WireError:
                continue
        return known
