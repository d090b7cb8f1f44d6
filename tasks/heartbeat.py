"""Announcing a worker to the fleet: its card in the broker, renewed for as long as it takes tasks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from celery import signals
from celery.concurrency.prefork import TaskPool as PreforkPool
from pydantic import ValidationError

from hetrain.public.broker.connection import broker_errors, client, connection_pool
from hetrain.public.errors import BrokerError
from hetrain.public.protocol.messages import QUEUE
from hetrain.public.protocol.registration import (
    HEARTBEAT_S,
    REGISTRATION_TTL_S,
    REGISTRY_KEY,
    WorkerRegistration,
)
from tasks.app import broker_url
from tasks.inspect_command import plain_line

_FAREWELL_S = 2.0

logger = logging.getLogger(__name__)


class Heartbeat:
    """One worker's card, kept alive by a thread of its own that outlives every trouble of the broker.

    Args:
        url: the broker's address.
        card: what is announced.
    """

    def __init__(self, url: str, card: WorkerRegistration) -> None:
        self._url = url
        self._member = card.model_dump_json()
        self._client = client(connection_pool(url, max_connections=1))
        # Unlike an event's, its `put` may be interrupted by a signal whose handler calls it again.
        self._orders: SimpleQueue[None] = SimpleQueue()
        self._in_trouble = False
        self._thread = threading.Thread(target=self._keep, name="hetrain-announcement", daemon=True)

    def start(self) -> None:
        """Begins to announce."""
        self._thread.start()

    def withdraw(self) -> None:
        """Has the card removed, at once and for good. Returns before that; signal handlers may call it."""
        self._orders.put(None)

    def wait(self, timeout_s: float) -> None:
        """Waits until the card is removed, or cannot be."""
        self._thread.join(timeout_s)

    def _keep(self) -> None:
        while True:
            self._try(self._renew)
            try:
                self._orders.get(timeout=HEARTBEAT_S)
            except Empty:
                continue
            return self._try(self._remove)

    def _try(self, action: Callable[[], None]) -> None:
        """Does it, or says once per spell of trouble why not: cards are no reason to end a worker."""
        try:
            with broker_errors(self._url):
                action()
        except BrokerError as error:
            if not self._in_trouble:
                logger.warning("clients cannot see this worker's card: %s", error)
            self._in_trouble = True
            return
        if self._in_trouble:
            logger.info("clients can see this worker's card again")
        self._in_trouble = False

    def _renew(self) -> None:
        seconds, microseconds = self._client.time()
        now = seconds + microseconds / 1e6
        pipe = self._client.pipeline(transaction=True)
        pipe.zadd(REGISTRY_KEY, {self._member: now + REGISTRATION_TTL_S})
        pipe.zremrangebyscore(REGISTRY_KEY, "-inf", now)
        pipe.pexpire(REGISTRY_KEY, int(REGISTRATION_TTL_S * 1000))  # it goes with the last card
        pipe.execute()

    def _remove(self) -> None:
        self._client.zrem(REGISTRY_KEY, self._member)


_current: list[Heartbeat] = []


@signals.worker_ready.connect
def _announce(sender: Any, **_: object) -> None:
    try:
        card = _card(sender)
    except ValidationError as error:
        reasons = "; ".join(f"{each['loc'][0]}: {each['msg']}" for each in error.errors())
        logger.warning("this worker cannot be announced to clients (%s)", reasons)
        return
    heartbeat = Heartbeat(broker_url(), card)
    heartbeat.start()
    _current.append(heartbeat)


@signals.worker_shutting_down.connect
def _withdraw(**_: object) -> None:
    """Before the last tasks end: this worker takes no more."""
    for heartbeat in _current:
        heartbeat.withdraw()


@signals.worker_shutdown.connect
def _take_leave(**_: object) -> None:
    _withdraw()
    while _current:
        _current.pop().wait(_FAREWELL_S)


def _card(consumer: Any) -> WorkerRegistration:
    """Raises `ValidationError` when a name or a queue was chosen that clients would not understand."""
    from worker_gpu.weights.shards import served_shards
    from worker_gpu.weights.store import served_models

    shards = served_shards()
    queues = [queue.name for queue in consumer.task_consumer.queues]
    return WorkerRegistration(
        worker=plain_line(consumer.hostname),
        device=_device(consumer.pool),
        queue=QUEUE if QUEUE in queues else queues[0],
        models=tuple(plain_line(label) for label in served_models()),
        shards=None if shards is None else str(shards),
        concurrency=consumer.controller.concurrency,
    )


def _device(pool: Any) -> str:
    if isinstance(pool, PreforkPool):
        return ""  # each forked process has its own; the parent must not touch CUDA
    from worker_gpu.service import service

    return plain_line(service().description)
