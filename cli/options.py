"""Options of the command line, made from the fields of `hetrain.config`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from cli.config_file import as_yaml, load_config
from hetrain.config import ComparisonConfig, EvaluationSpec, JobSpec, LoraConfig

_NAMES = {  # where an option is not called as its field, or has further names
    "model": ("--model-name-or-path", "--model", "-m"),
    "output_dir": ("--output-dir", "-o"),
    "workers": ("--broker-url",),
    "text_field": ("--text-field", "--dataset-text-field"),
    "learning_rate": ("--learning-rate", "--lr"),
    "num_train_epochs": ("--num-train-epochs", "--epochs"),
    "use_rslora": ("--use-rslora",),
}
_ENVIRONMENT = {"workers": "HETRAIN_BROKER_URL"}

AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON lines on standard output instead of a display.")
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Flat YAML with options as keys, as learning_rate: 2e-4. The command line wins.",
        is_eager=True,
        callback=load_config,
        show_default=False,
    ),
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print all options as YAML for --config, and do nothing.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


def from_configuration(run: Callable[..., None]) -> Callable[..., None]:
    """A Typer command of `run`: each parameter of a configuration class becomes an option for every field."""
    taken = inspect.signature(run, eval_str=True).parameters
    specs: dict[str, Any] = {
        name: each.annotation for name, each in taken.items() if is_dataclass(each.annotation)
    }

    def command(*, config: Config = None, print_config: PrintConfig = False, **values: Any) -> None:
        built = {name: _build(spec, values) for name, spec in specs.items()}
        if print_config:
            typer.echo(as_yaml(dict(flag for spec in built.values() for flag in _flags_of(spec))), nl=False)
        else:
            run(**built, **values)

    own = list(inspect.signature(command, eval_str=True).parameters.values())[:2]
    expanded = [parameter for spec in specs.values() for parameter in _parameters(spec)]
    others = [parameter for name, parameter in taken.items() if name not in specs]
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [parameter.replace(kind=keyword) for parameter in (*expanded, *own, *others)]
    command.__name__, command.__doc__ = run.__name__, run.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def option(config: type, name: str) -> Any:
    """The option of a single field, to annotate a command's parameter with."""
    (setting,) = (each for each in fields(config) if each.name == name)
    return _option(config, setting, get_type_hints(config)[name])


def with_dashes(name: str) -> str:
    """Makes `--learning_rate` the same as `--learning-rate`."""
    return name.replace("_", "-")


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
        setting.name: setting.name.upper()
        if setting.default is MISSING
        else _flags(config, setting, kind)[0].partition("/")[0]
        for spec in (JobSpec, EvaluationSpec, ComparisonConfig)
        for config, setting, kind in _settings(spec)
    }


def _flags_of(spec: Any) -> Iterator[tuple[str, Any]]:
    """Every setting of `spec` under the name of its option, in YAML's spelling."""
    types = get_type_hints(type(spec))
    for setting in fields(spec):
        value, kind = getattr(spec, setting.name), types[setting.name]
        if is_dataclass(value):
            yield from _flags_of(value)
        elif setting.default is MISSING:
            yield setting.name, value
        else:
            flag = _flags(type(spec), setting, kind)[0].partition("/")[0]
            yield flag.removeprefix("--").replace("-", "_"), value


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
            default=setting.default if given else None,  # a file of --config may have it
            annotation=Annotated[_typer_type(kind), _option(owner, setting, kind)],
        )


def _build(config: type, values: dict[str, Any]) -> Any:
    """An object of `config` from the values of its options, which are taken out of `values`."""
    types = get_type_hints(config)
    return config(
        **{
            setting.name: _build(types[setting.name], values)
            if is_dataclass(types[setting.name])
            else _given(setting, values.pop(_key(config, setting)))
            for setting in fields(config)
        }
    )


def _given(setting: Field[Any], value: Any) -> Any:
    return () if value is None and setting.default is MISSING else value


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
        return typer.Argument(help=shown["help"], show_default=False, metavar=shown["metavar"])
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
