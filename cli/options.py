"""Options of the command line, made from the fields of `hetrain.config`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from hetrain.config import ComparisonConfig, EvaluationSpec, JobSpec, LoraConfig

_NAMES = {  # where an option is not called as its field
    "model": ("--model-name-or-path", "-m"),
    "output_dir": ("--output-dir", "-o"),
    "workers": ("--broker-url",),
}
_ENVIRONMENT = {"workers": "HETRAIN_BROKER_URL"}

AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON lines on standard output instead of a display.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


def from_configuration(run: Callable[..., None]) -> Callable[..., None]:
    """A Typer command of `run`: each parameter of a configuration class becomes an option for every field."""
    taken = inspect.signature(run, eval_str=True).parameters
    specs: dict[str, Any] = {
        name: each.annotation for name, each in taken.items() if is_dataclass(each.annotation)
    }

    def command(**values: Any) -> None:
        run(**{name: _build(spec, values) for name, spec in specs.items()}, **values)

    expanded = [parameter for spec in specs.values() for parameter in _parameters(spec)]
    others = [parameter for name, parameter in taken.items() if name not in specs]
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [parameter.replace(kind=keyword) for parameter in (*expanded, *others)]
    command.__name__, command.__doc__ = run.__name__, run.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def option(config: type, name: str) -> Any:
    """The option of a single field, to annotate a command's parameter with."""
    (setting,) = (each for each in fields(config) if each.name == name)
    return _option(config, setting, get_type_hints(config)[name])


def as_options(text: str) -> str:
    """`text` with settings in backticks replaced by their options."""
    return re.sub(r"`(\w+)`", lambda match: _option_names().get(match[1], match[0]), text)


@cache
def _option_names() -> dict[str, str]:
    own = (
        "dtype",
        "check",
        "prompt_template",
        "max_new_tokens",
        "temperature",
        "batch_size",
    )  # of cli.adapter
    return {name: f"--{name.replace('_', '-')}" for name in own} | {
        setting.name: _flags(config, setting, kind)[0].partition("/")[0]
        for spec in (JobSpec, EvaluationSpec, ComparisonConfig)
        for config, setting, kind in _settings(spec)
        if setting.default is not MISSING
    }


def _settings(config: type) -> Iterator[tuple[type, Field[Any], Any]]:
    """Class, field and type of every setting of a configuration class and of those that it holds."""
    types = get_type_hints(config)
    for setting in fields(config):
        if is_dataclass(types[setting.name]):
            yield from _settings(types[setting.name])
        else:
            yield config, setting, types[setting.name]


def _parameters(config: type) -> Iterator[inspect.Parameter]:
    for owner, setting, kind in _settings(config):
        given = setting.default is not MISSING
        yield inspect.Parameter(
            _key(owner, setting),
            inspect.Parameter.KEYWORD_ONLY,
            default=setting.default if given else inspect.Parameter.empty,
            annotation=Annotated[_typer_type(kind), _option(owner, setting, kind)],
        )


def _build(config: type, values: dict[str, Any]) -> Any:
    """An object of `config` from the values of its options, which are taken out of `values`."""
    types = get_type_hints(config)
    return config(
        **{
            setting.name: _build(types[setting.name], values)
            if is_dataclass(types[setting.name])
            else values.pop(_key(config, setting))
            for setting in fields(config)
        }
    )


def _key(config: type, setting: Field[Any]) -> str:
    return f"lora_{setting.name}" if config is LoraConfig else setting.name


def _typer_type(kind: Any) -> Any:
    return list[str] if kind == tuple[str, ...] else kind


def _flags(config: type, setting: Field[Any], kind: Any) -> tuple[str, ...]:
    flag = _key(config, setting).replace("_", "-")
    return _NAMES.get(setting.name, (f"--{flag}/--no-{flag}" if kind == bool | None else f"--{flag}",))


def _option(config: type, setting: Field[Any], kind: Any) -> Any:
    shown = setting.metadata
    if setting.default is MISSING:
        return typer.Argument(help=shown["help"], show_default=False)
    default: bool | str = shown.get("default", NoneType not in get_args(kind))
    return typer.Option(
        *_flags(config, setting, kind),
        help=as_options(shown["help"]),
        metavar=shown.get("metavar"),
        parser=_size if shown.get("metavar") == "SIZE" else None,
        envvar=_ENVIRONMENT.get(setting.name),
        show_default=as_options(default) if isinstance(default, str) else default,
        rich_help_panel=config.__name__ if config.__name__.endswith("Config") else None,
    )


def _size(text: str) -> int:
    """Bytes, from a number with or without a unit."""
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise typer.BadParameter(f"{text!r} is no size: write a number of bytes, 500MB or 2GiB") from None
