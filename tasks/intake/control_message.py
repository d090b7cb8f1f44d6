"""Decides whether a message of remote control is one that a worker answers: a question. Pure.

Celery has commands that end a worker, revoke tasks, change its pool, its queues and its limits. None of them
exists here, for any party. What is left is what Flower and `hetrain doctor` ask.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field

from hetrain.public.protocol.messages import CONTROL_REPORT
from tasks.intake.envelope import (
    Accepted,
    Envelope,
    Properties,
    Refused,
    Strict,
    Word,
    parse_body,
    parse_envelope,
    refusal,
    validated,
)

_Id = Annotated[str, Field(max_length=200)]
_Ids = Annotated[list[_Id], Field(max_length=1000)]


class _NoArguments(Strict):
    pass


class _TaskIds(Strict):
    ids: _Ids


class _TaskFields(Strict):
    taskinfoitems: Annotated[list[_Id], Field(max_length=20)] | None = None
    builtins: bool = False


class _Defaults(Strict):
    with_defaults: bool = False


class _Safe(Strict):
    safe: bool | None = None


COMMANDS: Mapping[str, type[Strict]] = MappingProxyType(
    dict.fromkeys(
        (
            CONTROL_REPORT,
            "active_queues",
            "clock",
            "enable_events",  # Flower repeats it; they are enabled anyway
            "ping",
            "report",
            "reserved",
            "revoked",
            "scheduled",
            "stats",
        ),
        _NoArguments,
    )
    | {"active": _Safe, "conf": _Defaults, "query_task": _TaskIds, "registered": _TaskFields}
)
"""The commands that a worker has, each with its arguments."""


class _ControlHeaders(Strict):
    clock: Annotated[int, Field(ge=0, lt=1 << 53)]
    expires: Annotated[float, Field(ge=0)]


class _ControlEnvelope(Envelope):
    headers: _ControlHeaders
    properties: Properties


class _ReplyTo(Strict):
    exchange: Literal["reply.celery.pidbox"]
    routing_key: Word


class _Command(Strict):
    method: str
    arguments: dict[str, Any]
    destination: _Ids | None
    pattern: None
    matcher: None
    ticket: Word | None = None
    reply_to: _ReplyTo | None = None


def check_command(data: bytes) -> Accepted | Refused:
    """Whether `data`, which was published for workers, is one of `COMMANDS` with arguments that it takes."""
    try:
        message, envelope = parse_envelope(_ControlEnvelope, data)
        if envelope.properties.delivery_info.exchange != "celery.pidbox":
            raise ValueError("it was addressed to another exchange")
        command = validated(_Command, parse_body(envelope))
        if (arguments := COMMANDS.get(command.method)) is None:
            raise ValueError(f"there is no command {command.method!r}")
        validated(arguments, command.arguments)
    except ValueError as error:
        return refusal(error)
    return Accepted(message)
