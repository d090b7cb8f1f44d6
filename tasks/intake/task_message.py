"""Decides whether a message on a queue is exactly what a client of ours sends. Pure."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from hetrain.public.protocol.messages import TASK_EVALUATE, TASK_PREPARE, Token
from tasks.intake.envelope import (
    Accepted,
    Envelope,
    Properties,
    Refused,
    Shown,
    Strict,
    Word,
    Zero,
    parse_body,
    parse_envelope,
    refusal,
)

_NO_CANVAS = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def _is_true(value: bool) -> bool:
    if not value:
        raise ValueError("false")
    return value


_Yes = Annotated[bool, AfterValidator(_is_true)]


class _Nothing(Strict):
    """An empty object."""


class _TaskHeaders(Strict):
    """Celery's headers: one of our tasks, now, once, without limits and without others around it."""

    lang: Literal["py"]
    task: Literal["hetrain.evaluate", "hetrain.prepare"]
    id: Token
    shadow: None
    eta: None
    expires: None
    group: None
    group_index: None
    retries: Zero
    timelimit: Annotated[tuple[None, None], Field(strict=False)]
    root_id: Token
    parent_id: None
    argsrepr: Shown
    kwargsrepr: Shown
    origin: Literal["hetrain"]
    ignore_result: _Yes
    replaced_task_nesting: Zero
    stamped_headers: None
    stamps: _Nothing


class _TaskProperties(Properties):
    correlation_id: Token
    reply_to: Word
    argsrepr: Shown
    kwargsrepr: Shown
    origin: Literal["hetrain"]


class _TaskEnvelope(Envelope):
    headers: _TaskHeaders
    properties: _TaskProperties


assert {TASK_EVALUATE, TASK_PREPARE} == {"hetrain.evaluate", "hetrain.prepare"}


def check_task(data: bytes, queue: str) -> Accepted | Refused:
    """Whether `data` is a task that `hetrain.transport.requests.sender` sends to `queue`.

    What the task asks for, in its only argument, is for `tasks.run` to check, which answers its client.

    Args:
        data: what was popped from the queue.
        queue: the queue's name.
    """
    try:
        message, envelope = parse_envelope(_TaskEnvelope, data)
        _check_consistency(envelope, queue)
        _check_body(parse_body(envelope))
    except ValueError as error:
        return refusal(error)
    return Accepted(message)


def _check_consistency(envelope: _TaskEnvelope, queue: str) -> None:
    headers, properties = envelope.headers, envelope.properties
    place = properties.delivery_info
    if (place.exchange, place.routing_key) != ("", queue):
        raise ValueError("it was addressed to another queue")
    if not headers.id == headers.root_id == properties.correlation_id:
        raise ValueError("its ids differ")
    if (headers.argsrepr, headers.kwargsrepr) != (properties.argsrepr, properties.kwargsrepr):
        raise ValueError("its descriptions differ")


def _check_body(body: Any) -> None:
    match body:
        case [[str(argument)], dict(keywords), dict(canvas)] if not keywords and canvas == _NO_CANVAS:
            argument.encode()  # raises for half of a surrogate pair
        case _:
            raise ValueError("its body is not one text, without keywords, callbacks, chain and chord")
