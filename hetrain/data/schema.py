"""The forms of rows, and the check of a record against the one that its columns make it.

Forms are those of TRL's `SFTTrainer`, with ShareGPT's `conversations` and Alpaca's columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from hetrain.config import DataConfig
from hetrain.data.records import Record
from hetrain.public.errors import DatasetError

_FORMS_HINT = (
    "Give each row either text, or prompt and completion, or messages, or conversations, or instruction and "
    "output, or name your columns by `text_field`, `prompt_field` and `completion_field`"
)
# Of ShareGPT's turns, in lower case; a chat template would take other spellings for roles of their own.
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "assistant"), "assistant"),
    **{name: name for name in ("system", "developer", "tool")},
}
_LONGEST_ROLE = 40
_MESSAGE_LISTS = ("messages", "prompt", "completion")
# A CSV, and some Parquet files, hold these as JSON in a string.
_NESTED = ("messages", "conversations", "tools", "chat_template_kwargs")
# What counts as absent where nothing need be: null in JSON, an empty cell in CSV.
_NOTHING: dict[str, tuple[str | None, ...]] = {
    "input": (None,),
    "tools": (None, ""),
    "chat_template_kwargs": (None, ""),
}
# Names of arguments of transformers' apply_chat_template, which are no business of a row.
_RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)

_Text = Annotated[str, Field(min_length=1)]
_Objects = Annotated[list[dict[str, Any]], Field(min_length=1)]


class _Checked(BaseModel):
    # A rejected value is the owner's private text: pydantic must not repeat it in its message.
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)


class Message(_Checked):
    """One turn of a conversation. Only a turn with tool calls, and a tool's answer, may be empty."""

    role: _Text
    content: str | None = None
    tool_calls: _Objects | None = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("no_content", "has no content")
        if not self.content and not self.tool_calls and self.role != "tool":
            raise PydanticCustomError("empty_content", "has an empty content")
        return self

    def as_template_sees_it(self) -> dict[str, Any]:
        """Its fields without those that it lacks; `content` is always there, as templates expect."""
        return {"role": self.role, "content": self.content} | self.model_dump(exclude_none=True)


_Messages = Annotated[list[Message], Field(min_length=1)]


class TextForm(_Checked):
    """Plain text to continue."""

    text: _Text


class StringPair(_Checked):
    """A prompt and the completion to learn, as strings."""

    prompt: _Text
    completion: _Text


class InstructionForm(_Checked):
    """Alpaca's columns: a task, what it is about, and the answer to learn."""

    instruction: _Text
    input: str = ""
    output: _Text


class _Chat(_Checked):
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @field_validator("chat_template_kwargs")
    @classmethod
    def _concerns_the_template(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(_RESERVED & set(value)):
            raise PydanticCustomError("reserved", "may not set '{name}'", {"name": taken[0]})
        return value


class MessagePair(_Chat):
    """A prompt and the completion to learn, as lists of messages."""

    prompt: _Messages
    completion: _Messages


class Conversation(_Chat):
    """A whole conversation."""

    messages: _Messages


Form = TextForm | StringPair | InstructionForm | MessagePair | Conversation

FORM_NAMES: dict[type[Form], str] = {
    TextForm: "text",
    StringPair: "prompt and completion as strings",
    InstructionForm: "instruction and output",
    MessagePair: "prompt and completion as lists of messages",
    Conversation: "messages",
}


@dataclass(frozen=True)
class _Choice:
    """The form that a record has: `columns` maps fields of the form to columns of the record."""

    form: type[Form]
    columns: Mapping[str, str]


@dataclass(frozen=True)
class Checked:
    """A record's content, and the names of what is not used of it."""

    content: Form
    unused: frozenset[str]


def check_record(record: Record, config: DataConfig) -> Checked:
    """The content of a record.

    Raises:
        DatasetError: it has none of the forms, or a field is wrong. The message repeats no text of the row.
    """
    nested = ((name, _nested(value) if name in _NESTED else value) for name, value in record.columns.items())
    columns = {name: value for name, value in nested if value not in _NOTHING.get(name, ())}
    choice = _choose(columns, config, record.where)
    taken = {field: columns[name] for field, name in choice.columns.items() if name in columns}
    unused = set(columns) - set(choice.columns.values())
    for field in _MESSAGE_LISTS:
        if isinstance(taken.get(field), list):
            column = choice.columns[field]
            taken[field] = [_message(value, column, unused, record.where) for value in taken[field]]
    try:
        return Checked(choice.form.model_validate(taken), frozenset(unused))
    except ValidationError as error:
        raise _explained(error, choice, record.where) from error


def _nested(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _choose(columns: Mapping[str, Any], config: DataConfig, where: str) -> _Choice:
    """As TRL where a row has several forms: prompt and completion, then messages, then text."""
    text, prompt, completion = config.text_field, config.prompt_field, config.completion_field
    has_text, has_pair = text in columns, {prompt, completion} & set(columns)
    if config.has_own_text:
        found = _Choice(TextForm, {"text": text}) if has_text else None
    elif config.has_own_pair or len(has_pair) == 2:
        found = _pair(columns, prompt, completion, where) if has_pair else None
    elif "messages" in columns or "conversations" in columns:
        name = "messages" if "messages" in columns else "conversations"
        found = _Choice(Conversation, {"messages": name, **_chat_columns(columns)})
    elif has_text:
        found = _Choice(TextForm, {"text": text})
    elif "instruction" in columns:
        found = _Choice(InstructionForm, {name: name for name in ("instruction", "input", "output")})
    else:
        found = _pair(columns, prompt, completion, where) if has_pair else None
    if found is None:
        names = ", ".join(f"'{name}'" for name in columns) or "none"
        what = f"this row has none of the known columns, it has {names}"
        raise DatasetError(what, where=where, hint=_FORMS_HINT)
    return found


def _pair(columns: Mapping[str, Any], prompt: str, completion: str, where: str) -> _Choice:
    lists = [isinstance(columns[name], list) for name in (prompt, completion) if name in columns]
    if any(lists) and not all(lists):
        raise DatasetError(
            f"of the fields '{prompt}' and '{completion}', one is a list of messages and the other is not",
            where=where,
            hint="Write both as strings or both as lists of messages",
        )
    fields = {"prompt": prompt, "completion": completion}
    return (
        _Choice(MessagePair, fields | _chat_columns(columns)) if all(lists) else _Choice(StringPair, fields)
    )


def _chat_columns(columns: Mapping[str, Any]) -> dict[str, str]:
    return {name: name for name in ("tools", "chat_template_kwargs") if name in columns}


def _message(value: Any, column: str, unused: set[str], where: str) -> Any:
    """A message with ShareGPT's names replaced, and without fields that no chat template knows.

    Raises:
        DatasetError: ShareGPT has no such role.
    """
    if not isinstance(value, dict):
        return value
    message = {{"from": "role", "value": "content"}.get(name, name): each for name, each in value.items()}
    if "from" in value and isinstance(message["role"], str):
        message["role"] = _role(message["role"], column, where)
    # In a columnar file a message has the fields of all others, with null or nothing in them.
    others = {name for name, each in message.items() if name not in Message.model_fields}
    unused |= {f"{column}[].{name}" for name in others if message[name] is not None}
    known = {name: each for name, each in message.items() if name not in others}
    return {name: each for name, each in known.items() if (name, each) != ("tool_calls", [])}


def _role(name: str, column: str, where: str) -> str:
    role = _ROLES.get(name.strip().lower())
    if role is None:
        raise DatasetError(
            f"field '{column}' has a turn from '{name[:_LONGEST_ROLE]}', which is no known role",
            where=where,
            hint=f"Write one of: {', '.join(_ROLES)}; or give messages, whose roles reach the chat template",
        )
    return role


_PROBLEMS = {
    "missing": "is missing",
    "extra_forbidden": "does not belong here",
    "string_too_short": "is empty",
    "too_short": "is empty",
    "string_type": "must be a string",
    "string_unicode": "contains half of a surrogate pair, which is not a character",
    "list_type": "must be a list of messages",
    "model_type": "must be an object with role and content",
}


def _explained(error: ValidationError, choice: _Choice, where: str) -> DatasetError:
    first = error.errors(include_url=False, include_input=False)[0]
    head, *rest = first["loc"]
    path = [choice.columns.get(str(head), head), *rest]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    problem = _PROBLEMS.get(first["type"], first["msg"])
    if path[0] in ("tools", "chat_template_kwargs") or "tool_calls" in path:
        problem = first["msg"] if first["type"] == "reserved" else "is not as chat templates take it"
    hint = f"{_FORMS_HINT}; a message has role and content"
    return DatasetError(f"field '{field}' {problem}", where=where, hint=hint)
