"""A worker's consumer beside a full broker: it outlives it, slowly and with few words.

Kombu keeps its books in the broker, so a broker without memory breaks the consumer's connection again and
again. A message that was taken just then may be lost; its client sends it again.
"""

from __future__ import annotations

import logging
from time import monotonic, sleep
from typing import Any

from celery.worker import consumer
from redis.exceptions import OutOfMemoryError

_PAUSE_S = 1.0
_QUIET_S = 10.0
_HOUSEKEEPERS = ("kombu.asynchronous.hub", "kombu.transport.redis")


class Consumer(consumer.Consumer):
    """Celery's consumer, which would else connect to a full broker many times a second."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        brief = _Brief()
        for name in _HOUSEKEEPERS:
            logging.getLogger(name).addFilter(brief)

    def on_connection_error_before_connected(self, exc: BaseException) -> None:
        super().on_connection_error_before_connected(exc)
        _pause(exc)

    def on_connection_error_after_connected(self, exc: BaseException) -> None:
        super().on_connection_error_after_connected(exc)
        _pause(exc)


def _pause(error: BaseException) -> None:
    if isinstance(error, OutOfMemoryError):
        sleep(_PAUSE_S)


class _Brief(logging.Filter):
    """Makes one line now and then of the tracebacks that a full broker brings about every second."""

    def __init__(self) -> None:
        super().__init__()
        self._quiet_until = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, OutOfMemoryError):
            return True
        if monotonic() < self._quiet_until:
            return False
        self._quiet_until = monotonic() + _QUIET_S
        record.msg, record.args, record.exc_info = "the broker is out of memory (%s)", (error,), None
        return True
