"""What settings are made of: fields with help texts, and checks that name the field."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field, fields
from os import PathLike
from typing import Any, TypeVar

from hetrain.public.errors import UsageError
from hetrain.public.spelling import did_you_mean

T = TypeVar("T")


def setting(value: T, text: str, /, **more: Any) -> T:
    """A field with its default and help text.

    Args:
        value: the default.
        text: the help text.
        more: `default`, what None stands for; `metavar`, how a value is written; `least`, the smallest value.
    """
    return field(default=value, metadata={"help": text, **more})


def require(holds: bool, name: str, problem: str, hint: str = "") -> None:
    """Raises `UsageError` of the field `name` unless `holds`."""
    if not holds:
        raise UsageError(problem, field=name, hint=hint)


def require_least(config: Any) -> None:
    """Compares every field of `config` with its smallest value. Raises `UsageError`."""
    for each in fields(config):
        value, least = getattr(config, each.name), each.metadata.get("least")
        require(least is None or value is None or value >= least, each.name, f"{value} is less than {least}")


def require_known(name: str, value: str, known: Iterable[str]) -> None:
    """Raises `UsageError` if `value` is none of `known`."""
    names = list(known)
    meant = did_you_mean(value, names) or f"one of: {', '.join(names)}"
    require(value in names, name, f"{value!r} is not known", meant)


def as_tuple(given: str | PathLike[str] | Iterable[str | PathLike[str]]) -> tuple[str, ...]:
    """One name or path, or several, as a tuple of strings."""
    return (str(given),) if isinstance(given, str | PathLike) else tuple(map(str, given))
