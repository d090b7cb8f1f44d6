"""Reads a JSONL data set in TRL's forms and checks every line.

The forms are those of TRL's ``SFTTrainer``, and one file keeps to one of them:

    {"text": "..."}                                            every token is a target
    {"prompt": "...", "completion": "..."}                     the completion's tokens are targets
    {"prompt": [message, ...], "completion": [message, ...]}   the completion's tokens are targets
    {"messages": [message, ...]}                               every token is a target

with ``message = {"role": "...", "content": "..."}``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hetrain.public.errors import DatasetError

_FORMS_HINT = "Give each line either text, or prompt and completion, or messages"

_Text = Annotated[str, Field(min_length=1)]


class _Checked(BaseModel):
    # A rejected value is the owner's private text: pydantic must not repeat it in its message.
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)


class Message(_Checked):
    """One turn of a conversation."""

    role: _Text
    content: _Text


_Messages = Annotated[list[Message], Field(min_length=1)]


class TextForm(_Checked):
    """Plain text to continue."""

    text: _Text


class StringPair(_Checked):
    """A prompt and the completion to learn, as strings."""

    prompt: _Text
    completion: _Text


class MessagePair(_Checked):
    """A prompt and the completion to learn, as lists of messages."""

    prompt: _Messages
    completion: _Messages


class Conversation(_Checked):
    """A whole conversation."""

    messages: _Messages


Form = TextForm | StringPair | MessagePair | Conversation

_FORM_NAMES: dict[type[Form], str] = {
    TextForm: "text",
    StringPair: "prompt and completion as strings",
    MessagePair: "prompt and completion as lists of messages",
    Conversation: "messages",
}


@dataclass(frozen=True)
class RawRow:
    """A validated line, not yet tokenized; ``line`` counts from 1."""

    content: Form
    line: int


def read_raw_rows(path: Path) -> list[RawRow]:
    """Reads and checks every line of a JSONL file; see `read_rows` for what it raises."""
    rows: list[RawRow] = []
    for line, source in _lines(path):
        where = f"{path}:{line}"
        row = RawRow(_validate(_parse(source, where), where), line)
        if rows and type(row.content) is not type(rows[0].content):
            first = rows[0]
            raise DatasetError(
                f"this line has the form '{_FORM_NAMES[type(row.content)]}', "
                f"but line {first.line} has the form '{_FORM_NAMES[type(first.content)]}'",
                where=where,
                hint="Keep to one form per file",
            )
        rows.append(row)
    if not rows:
        raise DatasetError(
            "the data set is empty", where=str(path), hint="Give it at least one JSON object per line"
        )
    return rows


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DatasetError(
            f"the data set cannot be read: {error.strerror or error}",
            where=str(path),
            hint="Give the path of a JSONL file that you may read",
        ) from error
    # Only \n ends a line: str.splitlines would also cut at U+2028, which JSON strings may contain.
    for line, encoded in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            source = encoded.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise DatasetError(
                f"byte {error.start + 1} of this line is not UTF-8",
                where=f"{path}:{line}",
                hint="Save the file in UTF-8",
            ) from error
        if source:
            yield line, source


def _parse(source: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(source)
    except (ValueError, RecursionError) as error:
        detail = (
            f"{error.msg} (character {error.colno})"
            if isinstance(error, json.JSONDecodeError)
            else "bad value"
        )
        raise DatasetError(
            f"this line is not JSON: {detail}", where=where, hint="Write one complete JSON object per line"
        ) from error
    if not isinstance(value, dict):
        raise DatasetError("this line is not a JSON object", where=where, hint=_FORMS_HINT)
    return value


def _validate(value: dict[str, Any], where: str) -> Form:
    try:
        return _form_of(value, where).model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(
            "."
        )
        problem = {
            "missing": "is missing",
            "extra_forbidden": "does not belong here",
            "string_too_short": "is empty",
            "too_short": "is empty",
            "string_type": "must be a string",
            "string_unicode": "contains half of a surrogate pair, which is not a character",
            "list_type": "must be a list of messages",
            "model_type": "must be an object with role and content",
        }.get(first["type"], first["msg"])
        hint = f"{_FORMS_HINT}; a message has role and content; take out all else"
        raise DatasetError(f"field '{field}' {problem}", where=where, hint=hint) from error


def _form_of(value: dict[str, Any], where: str) -> type[Form]:
    if "text" in value:
        return TextForm
    if "messages" in value:
        return Conversation
    if "prompt" not in value and "completion" not in value:
        columns = ", ".join(f"'{name}'" for name in value) or "none"
        raise DatasetError(
            f"this line has none of the known columns, it has {columns}", where=where, hint=_FORMS_HINT
        )
    lists = [isinstance(value[name], list) for name in ("prompt", "completion") if name in value]
    if any(lists) and not all(lists):
        raise DatasetError(
            "of the fields 'prompt' and 'completion', one is a list of messages and the other is not",
            where=where,
            hint="Write both as strings or both as lists of messages",
        )
    return MessagePair if all(lists) else StringPair
