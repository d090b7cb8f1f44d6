"""The settings of a job as JSON, from which it can be started again in another directory and process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter

from hetrain.config import JobSpec


def without_place(spec: JobSpec) -> JobSpec:
    """`spec` with absolute paths, and without the broker's address, which may hold a password."""
    return replace(
        spec,
        dataset=tuple(map(_absolute, spec.dataset)),
        data=replace(spec.data, eval_dataset=tuple(map(_absolute, spec.data.eval_dataset))),
        model=_absolute(spec.model),
        output_dir=spec.output_dir.absolute(),
        workers=None,
        init_from=spec.init_from and spec.init_from.expanduser().absolute(),
        resume_from_checkpoint=None,
    )


def to_json(spec: JobSpec) -> dict[str, Any]:
    """All settings, as JSON has them."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(spec), default=str))
    return values


def from_json(values: Mapping[str, Any]) -> JobSpec:
    """The inverse of `to_json`. What is missing has its default, and what is not known is passed over.

    Raises:
        UsageError: a setting makes no sense.
        ValueError: a value has another type.
    """
    spec: JobSpec = _build(JobSpec, values)
    return spec


def _build(kind: type, values: Mapping[str, Any]) -> Any:
    types = get_type_hints(kind)
    given = {each.name: values[each.name] for each in fields(kind) if each.name in values}
    return kind(
        **{
            name: _build(types[name], value)
            if is_dataclass(types[name])
            else TypeAdapter(types[name]).validate_python(value)
            for name, value in given.items()
        }
    )


def _absolute(name: str) -> str:
    """A name that is a path here as one that holds everywhere."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name
