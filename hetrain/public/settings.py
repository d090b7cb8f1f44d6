"""What the environment sets: each variable declared, validated and described once, for worker and client.

An empty variable counts as not set. docs/reference/environment.md is generated from the fields.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    ByteSize,
    Field,
    PlainValidator,
    PositiveInt,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from hetrain.public.broker.connection import parse_broker_url
from hetrain.public.errors import UsageError
from hetrain.public.protocol.registration import ShardRange

_PREFIX = "HETRAIN_"


@dataclass(frozen=True)
class Form:
    """How a value is written, for messages: "'x' is no `noun`. `hint`"."""

    noun: str
    hint: str


_COUNT = Form("positive whole number", "write a number such as 4")


def variable(field: str) -> str:
    """The environment variable of a field: ``HETRAIN_DEVICE`` for ``device``."""
    return _PREFIX + field.upper()


def _broker_url(text: str) -> str:
    parse_broker_url(text)
    return text


def _models(text: str) -> tuple[tuple[str, str], ...]:
    if text.startswith("["):
        return tuple(("", str(path)) for path in json.loads(text))
    entries = (entry.strip().rpartition("=") for entry in text.split(","))
    return tuple((label, path) for label, _, path in entries if path)


BrokerUrl = Annotated[str, PlainValidator(_broker_url)]


class Settings(BaseSettings):
    """What client and worker share.

    Raises:
        UsageError: a variable has a value that makes no sense; names the variable and what to write.
    """

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, validate_default=False)

    cache: Path = Field(
        default_factory=lambda: Path.home() / ".cache" / "hetrain",
        description="directory of converted models and of products with masks; default `~/.cache/hetrain`",
    )

    @field_validator("*", mode="wrap")
    @classmethod
    def _name_the_variable(
        cls, value: Any, validate: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> Any:
        assert info.field_name is not None
        name, field = variable(info.field_name), cls.model_fields[info.field_name]
        if isinstance(value, str) and not value.strip():
            return field.get_default(call_default_factory=True)
        try:
            return validate(value)
        except UsageError as error:
            place = ": ".join(filter(None, (name, error.where)))
            raise UsageError(error.what, where=place, hint=error.hint) from error
        except (ValidationError, ValueError, OverflowError) as error:
            form = next(each for each in field.metadata if isinstance(each, Form))
            raise UsageError(f"{str(value)[:100]!r} is no {form.noun}", where=name, hint=form.hint) from error


class ClientSettings(Settings):
    """What a client reads."""

    broker_url: BrokerUrl | None = Field(
        default=None,
        repr=False,
        description="the broker; default: an embedded broker and workers on this machine",
    )
    tenant: Annotated[
        str,
        StringConstraints(pattern=re.compile(r"^([0-9a-f]{16})?\Z", re.ASCII)),
        Form(
            "tenant",
            "write 16 lower-case hexadecimal digits, as the broker's access list has them for this user",
        ),
    ] = Field(
        default="",
        description="16 hexadecimal digits with which the keys of its jobs begin, as in the broker's access "
        "list; default: none",
    )


class WorkerSettings(Settings):
    """What a worker reads."""

    broker_url: BrokerUrl = Field(
        default="redis://localhost:6379/0",
        repr=False,
        description="the broker; default `redis://localhost:6379/0`",
    )
    models: Annotated[
        tuple[tuple[str, str], ...],
        NoDecode,
        PlainValidator(_models),
        Form(
            "list of models", 'write names and paths, such as smollm2-135m,llama-3=/models/any, or ["/a,b"]'
        ),
    ] = Field(
        default=(("", "smollm2-135m"),),
        description="the models that it may serve: aliases, hub ids, paths or `label=path`, comma-separated; "
        "or a JSON list of names and paths; default `smollm2-135m`",
    )
    device: str | None = Field(
        default=None, description="torch device; default: CUDA where torch finds it, else the CPU"
    )
    worker_concurrency: Annotated[PositiveInt | None, _COUNT] = Field(
        default=None,
        description="tasks that a worker process runs at once, in threads; default 1, and for embedded "
        "workers `--in-flight`, at most one per core",
    )
    shards: Annotated[ShardRange | None, NoDecode, PlainValidator(ShardRange.parse)] = Field(
        default=None,
        description="part of every model that it serves, `FIRST-LAST/COUNT` such as `0-7/32`; the worker "
        "then takes tasks from a queue of its own (`gpu.0-7of32`) instead of `gpu`; default: whole models",
    )
    weights_bytes: Annotated[
        ByteSize | None, Field(gt=0), Form("number of bytes", "write a size such as 20GB or 512MiB")
    ] = Field(
        default=None,
        description="weights that it holds at once, such as `20GB`; the least recently used are dropped for "
        "others and loaded again when needed; default: 3/4 of a GPU's memory, no limit on a CPU",
    )
    visibility_timeout: Annotated[PositiveInt, _COUNT] = Field(
        default=120, description="seconds after which the queue offers an unfinished task again; default 120"
    )
    ready_fd: Annotated[int | None, Field(ge=0), Form("file descriptor", "leave it to the supervisor")] = (
        Field(
            default=None,
            description="file descriptor that it writes to when it can take tasks; set by supervisors",
        )
    )
