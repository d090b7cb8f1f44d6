"""A worker's consumer: publishes events in batches, and keeps running while the broker is out of memory.

A broker without memory breaks the consumer's connection repeatedly. A message that was taken at that moment
may be lost; its client sends it again.
"""

from __future__ import annotations

import logging
from time import monotonic, sleep
from typing import Any, ClassVar

from celery.worker import consumer
from redis.exceptions import OutOfMemoryError

_EVENTS_PAUSE_S = 0.25
_PAUSE_S = 1.0
_LOG_INTERVAL_S = 10.0
_NOISY_LOGGERS = ("kombu.asynchronous.hub", "kombu.transport.redis")


class Consumer(consumer.Consumer):
    """Celery's consumer with a pause after a failure; it would else reconnect many times a second.

    It exchanges nothing with other workers: what they say is not trusted, and not needed.
    """

    class Blueprint(consumer.Consumer.Blueprint):
        """Celery's steps but those in which workers hear of each other."""

        default_steps: ClassVar[list[str]] = [
            step
            for step in consumer.Consumer.Blueprint.default_steps
            if not step.endswith((":Mingle", ":Gossip"))
        ]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._has_events = False
        limit = _LimitOutOfMemoryLogs()
        for name in _NOISY_LOGGERS:
            logging.getLogger(name).addFilter(limit)

    def on_send_event_buffered(self) -> None:
        """Has events published soon. At once, as in Celery, they would be three round trips for each task."""
        if self.hub and not self._has_events:
            self._has_events = True
            self.hub.call_later(_EVENTS_PAUSE_S, self._publish_events)

    def _publish_events(self) -> None:
        self._has_events = False
        if self.event_dispatcher:
            self.event_dispatcher.flush()

    def on_connection_error_before_connected(self, exc: BaseException) -> None:
        super().on_connection_error_before_connected(exc)
        _pause(exc)

    def on_connection_error_after_connected(self, exc: BaseException) -> None:
        super().on_connection_error_after_connected(exc)
        _pause(exc)


def _pause(error: BaseException) -> None:
    if isinstance(error, OutOfMemoryError):
        sleep(_PAUSE_S)


class _LimitOutOfMemoryLogs(logging.Filter):
    """Replaces the tracebacks of a full broker, about one a second, by one line each interval."""

    def __init__(self) -> None:
        super().__init__()
        self._silent_until = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, OutOfMemoryError):
            return True
        if monotonic() < self._silent_until:
            return False
        self._silent_until = monotonic() + _LOG_INTERVAL_S
        record.msg, record.args, record.exc_info = "the broker is out of memory (%s)", (error,), None
        return True
