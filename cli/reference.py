"""`python -m cli.reference FILE` writes docs/reference/options.md, made from the commands themselves."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from cli.main import add_commands

_HEAD = """\
# Options

Made by `python -m cli.reference docs/reference/options.md` from `hetrain/config/` and the commands.

From Python, an option is the keyword argument or field of the same name: `--max-steps` is
`TrainingConfig.max_steps`, `--lora-r` is `LoraConfig.r`. Only `--model-name-or-path` and `--broker-url` are
called `model` and `workers` there. Headings name the class that has the field.
"""


def reference() -> str:
    """The options of all commands as a Markdown page."""
    sections = (_section(name, command) for name, command in add_commands().items() if not command.hidden)
    return "\n".join([_HEAD, *sections])


def _section(name: str, command: Any) -> str:
    usage = [each.name.upper() for each in command.params if each.param_type_name == "argument"]
    lines = [f"## `hetrain {' '.join([name, *usage])}`", "", command.help.partition("\n")[0]]
    panels: dict[str, list[Any]] = {}
    for each in command.params:
        panels.setdefault(getattr(each, "rich_help_panel", None) or "", []).append(each)
    for panel, members in panels.items():
        lines += ["", f"### `{panel}`"] if panel else []
        lines += ["", "| option | default | |", "| --- | --- | --- |", *map(_row, members)]
    return "\n".join([*lines, ""])


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        shown = parameter.show_default if isinstance(parameter.show_default, str) else "required"
        return f"| `{parameter.name.upper()}` | {shown} | {parameter.help} |"
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    shown, default = parameter.show_default, parameter.default
    if not isinstance(shown, str):
        text = ", ".join(default) if isinstance(default, list | tuple) else str(default)
        shown = "off" if default is False else "" if default is None or not shown else f"`{text}`"
    environment = f" Also `{parameter.envvar}`." if parameter.envvar else ""
    return f"| {names} | {shown} | {_escape(parameter.help)}{environment} |"


def _escape(text: str) -> str:
    return re.sub(r"[*|_]", r"\\\g<0>", text)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
