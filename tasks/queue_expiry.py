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
    REGISTRATION_TTL_S,
    REGISTRY_KEY,
    read_registration,
)

LOOK_S = 60.0
UNKNOWN_TTL_S = 900
_KEYS_AT_ONCE = 1000
_FORGOTTEN_S = 10 * REGISTRATION_TTL_S
"""A worker's queues are known for so long after its registration was seen last: it may be starting again."""

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
        self._seen: dict[str, float] = {}
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
            self._look(now)
        except NoPermissionError as error:
            logger.warning("queues without workers stay in the broker: %s", error)
            self._due = float("inf")
        except redis.RedisError as error:
            logger.info("could not look for queues without workers: %s", error)

    def _look(self, now: float) -> None:
        self._seen.update(dict.fromkeys(self._known(), now))
        self._seen = {queue: at for queue, at in self._seen.items() if at > now - _FORGOTTEN_S}
        queues = list(self._client.scan_iter(f"{QUEUE}.*", count=_KEYS_AT_ONCE, _type="list"))
        pipe = self._client.pipeline(transaction=False)
        for queue in queues:
            if queue.decode(errors="replace") in self._seen:
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
