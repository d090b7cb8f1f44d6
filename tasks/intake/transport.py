"""Kombu's Redis transport for queues to which strangers may push: what is not ours never becomes a message.

By themselves, kombu and Celery end at a message that is no JSON, and at a header of another type.
"""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

from kombu.transport import TRANSPORT_ALIASES, redis

from tasks.intake.control_message import check_command
from tasks.intake.envelope import Accepted, Refused
from tasks.intake.fair_order import FairOrder
from tasks.intake.refusals import refusals
from tasks.intake.task_message import check_task

_REPLIES = ".reply.celery.pidbox"
_COMMANDS = "celery.pidbox"


class Channel(redis.Channel):
    """Kombu's channel, which drops, counts and logs what is no task or command of ours.

    It looks at its queues in `FairOrder`; a task takes from its delivery to its acknowledgement or rejection.
    Messages for Flower and for those who ask workers are left alone: a worker takes none of these.
    """

    # Nothing is ever put back: clients alone send again what is lost, and a poison message would come again.
    do_restore = False
    queue_order_strategy = FairOrder

    def _create_client(self, asynchronous: bool = False) -> Any:
        client = super()._create_client(asynchronous)
        client.set_response_callback("BRPOP", self._only_tasks)
        return client

    def _only_tasks(self, reply: Any, **_: Any) -> tuple[bytes, bytes] | None:
        """A reply to BRPOP; None, which stands for no message in time, instead of one that is refused."""
        if not reply:
            return None
        key, data = reply
        queue = key.decode().rsplit(self.sep, 1)[0]
        if queue.endswith(_REPLIES):
            return key, data
        tag = str(uuid4())
        checked = _fresh(check_task(data, queue), f"queue {queue}", tag)
        if checked is None:
            self._queue_cycle.rotate(queue)  # another queue of this worker gets its turn
            return None
        self._queue_cycle.begin(queue, tag)
        return key, checked

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        """Acknowledges a message, whose task has ended."""
        self._queue_cycle.end(delivery_tag)
        super().basic_ack(delivery_tag, multiple)

    def basic_reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Rejects a message, whose task does not run."""
        self._queue_cycle.end(delivery_tag)
        super().basic_reject(delivery_tag, requeue)

    def _handle_message(self, client: Any, r: Any) -> dict[str, Any]:
        """What was published; without its data, which stands for nothing, if that is refused."""
        payload: dict[str, Any] = super()._handle_message(client, r)
        if payload["type"].endswith(b"message") and payload["channel"].endswith(_COMMANDS.encode()):
            payload["data"] = _fresh(check_command(payload["data"]), "remote control", str(uuid4()))
        return payload


class Transport(redis.Transport):
    """Kombu's transport with our channel."""

    Channel = Channel


def register() -> None:
    """Has kombu use this transport for all Redis brokers of this process."""
    TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), f"{__name__}:Transport"))


def _fresh(verdict: Accepted | Refused, source: str, tag: str) -> bytes | None:
    """An accepted message, written anew under a delivery tag of our own, so that nothing has two readings.

    Kombu counts by these tags what a worker has taken. With one that a sender repeats, it would take more.
    """
    if isinstance(verdict, Refused):
        refusals.note(source, verdict)
        return None
    properties = verdict.message["properties"] | {"delivery_tag": tag}
    return json.dumps(verdict.message | {"properties": properties}).encode()
