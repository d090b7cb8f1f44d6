"""What the environment sets: each variable declared, validated and described once, for worker and client.

An empty variable counts as not set. docs/reference/environment.md is generated from the fields.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import ByteSize, Field, PlainValidator, ValidationInfo, field_validator
from pydantic import ValidatorFunctionWrapHandler as Validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from hetrain.public.broker.connection import parse_broker_url, with_password
from hetrain.public.errors import UsageError
from hetrain.public.protocol.registration import ShardRange

_PREFIX = "HETRAIN_"


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


def _state_directory() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "hetrain"


_BrokerUrl = Annotated[str, PlainValidator(_broker_url)]
_Models = Annotated[tuple[tuple[str, str], ...], NoDecode, PlainValidator(_models)]
_Shards = Annotated[ShardRange | None, NoDecode, PlainValidator(ShardRange.parse)]
_COUNT: Any = Field(gt=0, title="positive whole number", examples=["a number such as 4"])


class Settings(BaseSettings):
    """What client and worker share. A field's title and examples word the error of a value that is refused.

    Raises:
        UsageError: a variable has a value that makes no sense; names the variable and what to write.
    """

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, validate_default=False)

    cache: Path = Field(
        default_factory=lambda: Path.home() / ".cache" / "hetrain",
        description="directory of converted models, of products with masks, and of a client's scratch files; "
        "default `~/.cache/hetrain`",
    )

    broker_password_file: Path | None = Field(
        default=None,
        description="file whose first line is the broker's password, for an address without one",
    )

    @field_validator("*", mode="wrap")
    @classmethod
    def _name_the_variable(cls, value: Any, validate: Validator, info: ValidationInfo) -> Any:
        field, name = cls.model_fields[str(info.field_name)], variable(str(info.field_name))
        if isinstance(value, str) and not value.strip():
            return field.get_default(call_default_factory=True)
        try:
            return validate(value)
        except UsageError as error:
            place = ": ".join(filter(None, (name, error.where)))
            raise UsageError(error.what, where=place, hint=error.hint) from error
        except (ValueError, OverflowError) as error:
            what, hint = f"{str(value)[:100]!r} is no {field.title}", f"write {(field.examples or [''])[0]}"
            raise UsageError(what, where=name, hint=hint) from error


class ClientSettings(Settings):
    """What a client reads."""

    broker_url: _BrokerUrl | None = Field(
        default=None,
        repr=False,
        description="the broker; default: an embedded broker and workers on this machine",
    )
    tenant: str = Field(
        default="",
        pattern="^[0-9a-f]{16}$",
        title="tenant",
        examples=["16 lower-case hexadecimal digits, as the broker's access list has them for this user"],
        description="16 hexadecimal digits with which the keys of its jobs begin, as in the broker's access "
        "list; default: none",
    )

    state: Path = Field(
        default_factory=_state_directory,
        description="directory of the pointers to this user's jobs; default `hetrain` in `XDG_STATE_HOME` or "
        "`~/.local/state`",
    )
    disk_wait_s: float = Field(
        default=600.0,
        ge=0,
        title="number of seconds",
        examples=["a number such as 600"],
        description="seconds that training waits for room when the disk of its output directory is full, "
        "before it ends with its last state; default 600",
    )


class WorkerSettings(Settings):
    """What a worker reads."""

    broker_url: _BrokerUrl = Field(
        default="redis://localhost:6379/0",
        repr=False,
        description="the broker; default `redis://localhost:6379/0`",
    )
    models: _Models = Field(
        default=(("", "smollm2-135m"),),
        title="list of models",
        examples=['names and paths, such as smollm2-135m,llama-3=/models/any, or ["/a,b"]'],
        description="the models that it may serve: aliases, hub ids, paths or `label=path`, comma-separated; "
        "or a JSON list of names and paths; default `smollm2-135m`",
    )
    device: str | None = Field(
        default=None, description="torch device; default: CUDA where torch finds it, else the CPU"
    )
    worker_concurrency: Annotated[int | None, _COUNT] = Field(
        default=None,
        description="tasks that a worker process runs at once, in threads; default 1, and for embedded "
        "workers `--in-flight`, at most one per core",
    )
    shards: _Shards = Field(
        default=None,
        description="part of every model that it serves, `FIRST-LAST/COUNT` such as `0-7/32`; the worker "
        "then takes tasks from a queue of its own (`gpu.0-7of32`) instead of `gpu`; default: whole models",
    )
    weights_bytes: ByteSize | None = Field(
        default=None,
        gt=0,
        title="number of bytes",
        examples=["a size such as 20GB or 512MiB"],
        description="weights that it holds at once, such as `20GB`; the least recently used are dropped for "
        "others and loaded again when needed; default: 3/4 of a GPU's memory, no limit on a CPU",
    )
    stall_s: float | None = Field(
        default=None,
        gt=0,
        title="number of seconds",
        examples=["a number such as 300"],
        description="seconds that a task may run; when all tasks of a worker have run for longer, and others "
        "wait, it ends, and a supervisor starts it again; default: 9/10 of what clients wait, that is 540, "
        "or 1620 to prepare a job",
    )
    ready_fd: int | None = Field(
        default=None,
        ge=0,
        title="file descriptor",
        examples=["nothing: supervisors set it"],
        description="file descriptor that it writes to when it can take tasks; set by supervisors",
    )


def broker_address(url: str) -> str:
    """`url` with the password in the file of HETRAIN_BROKER_PASSWORD_FILE, if that is set and it has none.

    Raises:
        UsageError: the URL makes no sense, or the file cannot be read or is empty.
    """
    parse_broker_url(url)
    path = Settings().broker_password_file
    if path is None:
        return url
    try:
        password = next(iter(path.read_text(encoding="utf-8").splitlines()), "")
    except (OSError, ValueError) as error:
        password, reason = "", f"cannot be read: {error}"
    else:
        reason = "has no first line"
    if not password:
        raise UsageError(
            f"the file with the broker's password {reason}",
            where=variable("broker_password_file"),
            hint="write the password alone into it",
        )
    return with_password(url, password)
