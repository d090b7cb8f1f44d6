"""Kombu's envelope of a message: its form, and the JSON of its body."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from tasks.intake.strict_json import parse_json

MAX_MESSAGE_BYTES = 64 << 10
_MAX_DEPTH = 8
_REASON_LENGTH = 200


@dataclass(frozen=True)
class Accepted:
    """A message that is exactly what a program of ours sends.

    Attributes:
        message: its envelope, parsed.
    """

    message: dict[str, Any]


@dataclass(frozen=True)
class Refused:
    """Any other message.

    Attributes:
        reason: why, as one printable line of at most 200 characters.
    """

    reason: str


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("control characters")
    return text


Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Shown = Annotated[str, Field(max_length=400), AfterValidator(_printable)]
"""What Flower shows of a task."""
# Not literals, which take False for 0.
Zero = Annotated[int, Field(ge=0, le=0)]
Two = Annotated[int, Field(ge=2, le=2)]


class Strict(BaseModel):
    """A part of a message that has these fields and no others."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class DeliveryInfo(Strict):
    """Where it was sent."""

    exchange: str
    routing_key: str


class Properties(Strict):
    """Kombu's own properties, which every message has."""

    delivery_mode: Two
    delivery_info: DeliveryInfo
    priority: Zero
    body_encoding: Literal["base64"]
    delivery_tag: Word


class Envelope(Strict):
    """A message but for its headers and properties, which differ between kinds of messages."""

    body: str
    content_encoding: Annotated[Literal["utf-8"], Field(alias="content-encoding")]
    content_type: Annotated[Literal["application/json"], Field(alias="content-type")]


E = TypeVar("E", bound=Envelope)
M = TypeVar("M", bound=BaseModel)


def parse_envelope(kind: type[E], data: bytes) -> tuple[dict[str, Any], E]:
    """An envelope as kombu parses it, and as `kind`. Raises `ValueError` unless it is exactly that."""
    message = parse_json(data, max_bytes=MAX_MESSAGE_BYTES, max_depth=_MAX_DEPTH)
    return message, validated(kind, message)


def parse_body(envelope: Envelope) -> Any:
    """The value that the body stands for. Raises `ValueError` unless it is JSON in base64."""
    try:
        body = base64.b64decode(envelope.body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("its body is not base64") from error
    return parse_json(body, max_bytes=MAX_MESSAGE_BYTES, max_depth=_MAX_DEPTH)


def validated(kind: type[M], value: Any) -> M:
    """`value` as `kind`. Raises `ValueError`, which names the first wrong field."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from error


def refusal(error: ValueError) -> Refused:
    """The refusal for `error`, whose text may repeat names that a stranger chose."""
    text = "".join(char if char.isprintable() else "?" for char in str(error))
    return Refused(text[:_REASON_LENGTH] or type(error).__name__)
