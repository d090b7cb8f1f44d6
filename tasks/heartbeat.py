"""A worker's registration in the broker, renewed for as long as the worker takes tasks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any

from celery import signals
from pydantic import ValidationError

from hetrain.public.broker.connection import broker_errors, client, connection_pool
from hetrain.public.errors import BrokerError
from hetrain.public.protocol.messages import QUEUE
from hetrain.public.protocol.registration import (
    HEARTBEAT_S,
    REGISTRATION_TTL_S,
    REGISTRY_KEY,
    WorkerRegistration,
    lane_queues,
)
from hetrain.public.settings import WorkerSettings
from tasks.app import broker_url
from tasks.inspect_command import plain_line
from tasks.queue_expiry import QueueExpiry
from tasks.stall import end_stalled_process, expect_end, expect_signs, running_tasks, stands_still

_WITHDRAWAL_S = 2.0

logger = logging.getLogger(__name__)


class Heartbeat:
    """Renews one worker's registration in a thread of its own, which survives every failure of the broker.

    It also ends the worker, so that it is started again, when that stands still while tasks wait.

    Args:
        url: the broker's address.
        registration: what is renewed.
    """

    def __init__(self, url: str, registration: WorkerRegistration) -> None:
        self._url = url
        self._registration = registration
        self._member = registration.model_dump_json()
        self._client = client(connection_pool(url, max_connections=1))
        self._expiry = QueueExpiry(self._client, registration.queues)
        # Unlike an event's `set`, its `put` may be interrupted by a signal whose handler calls it again.
        self._withdrawals: SimpleQueue[None] = SimpleQueue()
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="hetrain-heartbeat", daemon=True)

    def start(self) -> None:
        """Begins to renew."""
        self._thread.start()

    def withdraw(self) -> None:
        """Has the registration removed. Returns before that; signal handlers may call it."""
        self._withdrawals.put(None)

    def wait(self, timeout_s: float) -> None:
        """Waits until the registration is removed, or cannot be."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            expect_signs()
            self._try(self._renew)
            self._expiry.look_if_due()
            if self._stands_still():
                self._try(self._remove)
                end_stalled_process()
            try:
                self._withdrawals.get(timeout=HEARTBEAT_S)
            except Empty:
                continue
            expect_end()
            return self._try(self._remove)

    def _stands_still(self) -> bool:
        """Whether no task ends, while others wait."""
        if not stands_still(running_tasks.ends(), self._registration.concurrency, monotonic()):
            return False
        waiting = 0

        def count_waiting() -> None:
            nonlocal waiting
            pipe = self._client.pipeline(transaction=False)
            for queue in self._registration.queues:
                pipe.llen(queue)
            waiting = sum(map(int, pipe.execute()))

        self._try(count_waiting)
        return waiting > 0

    def _try(self, action: Callable[[], None]) -> None:
        """Runs `action`. Logs the first of several failures in a row: none is a reason to end a worker."""
        try:
            with broker_errors(self._url):
                action()
        except BrokerError as error:
            if not self._failing:
                logger.warning("clients cannot see this worker's registration: %s", error)
            self._failing = True
            return
        if self._failing:
            logger.info("clients can see this worker's registration again")
        self._failing = False

    def _renew(self) -> None:
        seconds, microseconds = self._client.time()
        now = seconds + microseconds / 1e6
        pipe = self._client.pipeline(transaction=True)
        pipe.zadd(REGISTRY_KEY, {self._member: now + REGISTRATION_TTL_S})
        pipe.zremrangebyscore(REGISTRY_KEY, "-inf", now)
        pipe.pexpire(REGISTRY_KEY, int(REGISTRATION_TTL_S * 1000))  # it expires with the last registration
        pipe.execute()

    def _remove(self) -> None:
        self._client.zrem(REGISTRY_KEY, self._member)


_running: list[Heartbeat] = []


@signals.worker_ready.connect
def _register(sender: Any, **_: object) -> None:
    try:
        registration = _registration(sender)
    except ValidationError as error:
        reasons = "; ".join(f"{each['loc'][0]}: {each['msg']}" for each in error.errors())
        logger.warning("this worker cannot be registered for clients (%s)", reasons)
        return
    heartbeat = Heartbeat(broker_url(), registration)
    heartbeat.start()
    _running.append(heartbeat)


@signals.worker_shutting_down.connect
def _withdraw(**_: object) -> None:
    """Before the last tasks end: this worker takes no more."""
    for heartbeat in _running:
        heartbeat.withdraw()


@signals.worker_shutdown.connect
def _await_withdrawal(**_: object) -> None:
    _withdraw()
    while _running:
        _running.pop().wait(_WITHDRAWAL_S)


def _registration(consumer: Any) -> WorkerRegistration:
    """Raises `ValidationError` for a name or a queue that clients would not understand."""
    from worker_gpu.service import service
    from worker_gpu.weights.store import available_models

    taken = {queue.name for queue in consumer.task_consumer.queues}
    shards = WorkerSettings().shards
    queue = shards.queue if shards is not None else QUEUE if QUEUE in taken else min(taken)
    models = tuple(plain_line(label) for label in available_models())
    lanes = lane_queues(queue, models)
    return WorkerRegistration(
        worker=plain_line(consumer.hostname),
        device=plain_line(service().description),
        queue=queue,
        lanes=bool(lanes) and taken.issuperset(lanes),
        models=models,
        shards=None if shards is None else str(shards),
        concurrency=consumer.controller.concurrency,
    )
