"""Messages between client and workers: small, readable JSON; ciphertexts travel beside them as blobs.

A message is parsed once, at the edge, into a frozen object. Unknown fields, unknown versions and
values outside their range are refused, since each side treats what the other sends as hostile.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
)

from hetrain.public.errors import WireError

VERSION: Literal[2] = 2
TASK_EVALUATE = "hetrain.evaluate"
TASK_PREPARE = "hetrain.prepare"
CONTROL_REPORT = "hetrain_report"
QUEUE = "gpu"
MAX_BLOB_BYTES = 4 << 30

Token = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16,64}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/\-]{0,199}$")]
# Text that a peer chose and that may end on a terminal: without control characters.
Line = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$", max_length=200)]
Paragraph = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$", max_length=1000)]
# A peer's name as one word, so that it cannot pass for a sentence of ours.
WorkerName = Annotated[Line, AfterValidator(lambda name: re.sub(r"[^\w.@:/-]", "?", name)[:100] or "?")]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
Header = Mapping[str, JsonValue]
"""An engine's own public part of a message, as it travels: see `EngineHeader`."""


def new_token() -> str:
    """128 random bits in hexadecimal, for job, request and blob identifiers."""
    return secrets.token_hex(16)


class _Message(BaseModel):
    # What is wrong with a message is shown to others, such as Flower's readers; its content is not.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    version: Literal[2] = VERSION

    def to_json(self) -> str:
        return self.model_dump_json()


class Blob(BaseModel):
    """Where a blob lies: ``hetrain:{job}:{kind}:{token}`` in chunks, and how long it must be."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    job: Token
    kind: Literal["plan", "in", "out"]
    token: Token
    nbytes: Annotated[int, Field(ge=0, le=MAX_BLOB_BYTES)]

    @property
    def key(self) -> str:
        return f"hetrain:{self.job}:{self.kind}:{self.token}"


class PrepareTask(_Message):
    """Asks a worker to load a job's plan and matrices and to say whether it can serve them.

    ``setup`` is the engine's own part, the same for all products of the job.
    """

    request: Token
    job: Token
    model: Name
    engine: Name
    plan: Blob
    plan_digest: Token
    setup: dict[str, JsonValue] = Field(default_factory=dict)


class EvaluateTask(_Message):
    """Asks a worker to multiply one ciphertext matrix by rows ``start:stop`` of one public matrix.

    ``header`` is the engine's own part (parameter set, mask seed), which it parses: see `EngineHeader`.
    """

    request: Token
    job: Token
    model: Name
    engine: Name
    plan: Blob
    plan_digest: Token
    group: Name
    direction: Direction
    start: Annotated[int, Field(ge=0)]
    stop: Annotated[int, Field(ge=1)]
    header: dict[str, JsonValue]
    input: Blob


class Failure(BaseModel):
    """Why a task failed: the name of an error class of `hetrain.public.errors` and its parts."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    error: Annotated[str, Field(max_length=100)]
    what: Annotated[str, Field(max_length=2000)]
    where: Annotated[str, Field(max_length=500)] = ""
    hint: Annotated[str, Field(max_length=2000)] = ""


class Completion(_Message):
    """What a worker pushes to the client's done-list when a task has started, ended or failed."""

    request: Token
    state: Literal["started", "done", "failed"]
    worker: WorkerName
    device: Line = ""
    seconds: Seconds = 0.0
    output: Blob | None = None
    failure: Failure | None = None


class EngineReport(BaseModel):
    """A worker's report on one engine: what it computes on, or why it refuses jobs."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Name
    state: Literal["ready", "refused", "opening"]
    description: Paragraph = ""


class WorkerReport(_Message):
    """A worker's reply to the control command `CONTROL_REPORT`.

    ``device`` names device and kernel, as in results. ``shards`` names the slices of its models that it
    serves, empty for all. ``concurrency`` counts the tasks that it runs at once.
    """

    worker: WorkerName
    hostname: Line
    hetrain: Line
    device: Line
    engines: Annotated[list[EngineReport], Field(max_length=32)]
    models: Annotated[list[Line], Field(max_length=1000)]
    shards: Line = ""
    queues: Annotated[list[Line], Field(max_length=100)]
    concurrency: Annotated[int, Field(ge=1, le=1 << 16)]


class EngineHeader(BaseModel):
    """An engine's own part of a `PrepareTask` or an `EvaluateTask`: public and small. This one is empty."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    def to_wire(self) -> Header:
        """What travels: fields that are None are left out."""
        return self.model_dump(exclude_none=True)

    @classmethod
    def from_wire(cls, header: Header, *, where: str) -> Self:
        """Parses what a client sent. Raises `WireError`, which names the first wrong field."""
        try:
            return cls.model_validate(header)
        except ValidationError as error:
            raise _malformed(cls, error, where) from error


def printable(value: object) -> str:
    """`value` as at most 100 characters without control characters."""
    return "".join(char if char.isprintable() else " " for char in str(value)[:100])


M = TypeVar("M", bound=BaseModel)


def parse(kind: type[M], text: str | bytes, *, where: str) -> M:
    """Parses one message. Raises `WireError` when it is not exactly what `kind` describes."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise _malformed(kind, error, where) from error


def _malformed(kind: type[BaseModel], error: ValidationError, where: str) -> WireError:
    first = error.errors()[0]
    if first["loc"] == ("version",):  # it is compared first
        found = printable(first["input"])
        return WireError(
            f"wire version {found} is not spoken here, only {VERSION} (a {kind.__name__})",
            where=where,
            hint="install the same version of hetrain on client and workers: docs/operations.md",
        )
    place = printable(".".join(str(part) for part in first["loc"]))  # the peer may have chosen names in it
    return WireError(
        f"malformed {kind.__name__} message: {place}: {first['msg']}",
        where=where,
        hint="client and worker probably run different versions of hetrain",
    )
