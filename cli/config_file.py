"""`--config`: the options of a command as flat YAML, and `--print-config`, which writes it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
import yaml

from cli.trl_options import Translated, translate
from hetrain.public.errors import UsageError
from hetrain.public.spelling import did_you_mean

_NOT_IN_A_FILE = {"config", "print_config", "help", "as_json", "quiet", "dry_run"}

# Where null means something else to TRL than the default that it would be here.
_NOT_NULL = {"max_length": "rows must fit micro-batches: give a number of tokens, or leave it out"}

_log = logging.getLogger(__name__)


def load_config(context: typer.Context, path: Path | None) -> None:
    """Callback of `--config`: makes the file's values the defaults of the command's options.

    A file of `trl sft` is read as TRL means it; what has no effect here is named in one line of the log.

    Raises:
        UsageError: it cannot be read, is no flat YAML, has keys that are no options of the command or twice
            the same one, null where that is not the default, or options of TRL that have no meaning here.
    """
    if path is None:
        return
    found = translate({key.replace("-", "_"): value for key, value in _read(path).items()})
    values, problems = _values_of(found, dict(_keys(context)))
    if problems := [*problems, *found.refused]:
        raise UsageError("; ".join(problems), where=str(path), hint="Keys are the names of options")
    if found.without_effect:
        named = ", ".join(f"{name} ({reason})" for name, reason in found.without_effect.items())
        _log.info("%s: without effect here: %s", path, named)
    context.default_map = {**(context.default_map or {}), **values}


def _values_of(found: Translated, keys: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values of a command's parameters by their names, and what is wrong with them."""
    values: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    problems = []
    for key, value in found.values.items():
        parameter = keys.get(found.spelled[key])
        if parameter is None:
            meant = did_you_mean(key, keys)
            problems.append(f"{key} is not known{f' ({meant})' if meant else ''}")
        elif (other := spelled.setdefault(str(parameter.name), key)) != key:
            problems.append(f"{other} and {key} are the same option: keep one of the two")
        elif isinstance(value, dict):
            problems.append(f"{key} holds further keys, but the file is flat")
        elif value is not None:
            values[str(parameter.name)] = _as_written(parameter, value)
        elif reason := _why_not_null(parameter):
            problems.append(f"{key} may not be null: {reason}")
    return values, problems


def as_yaml(values: Mapping[str, Any]) -> str:
    """Flat YAML of option names and values; those that are None are left out, and so are passwords."""
    shown = {name: _plain(value) for name, value in values.items() if value is not None}
    if "@" in str(shown.get("broker_url", "")):
        del shown["broker_url"]
    text: str = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _keys(context: typer.Context) -> Iterator[tuple[str, Any]]:
    """The parameters of a command by each of their names."""
    for parameter in context.command.params:
        if parameter.name in _NOT_IN_A_FILE:
            continue
        yield str(parameter.name), parameter
        for option in parameter.opts:
            if option.startswith("--"):
                yield option[2:].replace("-", "_"), parameter


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        found = yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        place = getattr(error, "problem_mark", None)
        where = f"{path}:{place.line + 1}" if place else str(path)
        what = getattr(error, "problem", None) or "it is not UTF-8"
        raise UsageError(f"this is no YAML: {what}", where=where, hint="Write lines of key: value") from error
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UsageError("the file holds no keys", where=str(path), hint="Write lines of key: value")
    names = [str(key.value).replace("-", "_") for key, _ in node.value]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{twice[0]} stands there twice", where=str(path), hint="Keep one of the two")
    return found


def _why_not_null(parameter: Any) -> str:
    """Why an option takes no null; nothing where null is its default."""
    default = parameter.default
    known = "leave it out for its default" if default not in (None, (), []) else ""
    return _NOT_NULL.get(str(parameter.name), known)


def _as_written(parameter: Any, value: Any) -> Any:
    """The value as on a command line: text, but lists where an option may be repeated."""
    many = parameter.nargs == -1 or getattr(parameter, "multiple", False)
    if many:
        return [str(each) for each in value] if isinstance(value, list) else [str(value)]
    return value if isinstance(value, bool) else str(value)
