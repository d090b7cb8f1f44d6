"""Reads a JSONL data set in TRL's forms, checks every line, and turns it into token rows.

The forms are those of TRL's ``SFTTrainer``, and one file keeps to one of them:

    {"text": "..."}                                            every token is a target
    {"prompt": "...", "completion": "..."}                     the completion's tokens are targets
    {"prompt": [message, ...], "completion": [message, ...]}   the completion's tokens are targets
    {"messages": [message, ...]}                               every token is a target

with ``message = {"role": "...", "content": "..."}``. Tokens and targets are those of TRL 1.16
with its defaults.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hetrain.public.errors import DatasetError, ModelError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

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
    """A validated line, not yet tokenised; ``line`` counts from 1."""

    content: Form
    line: int


@dataclass(frozen=True)
class Row:
    """One training sequence.

    Attributes:
        tokens: token ids, at least two.
        supervised: ``supervised[i]`` says whether token i is a target of the loss; at least one is, and
            token 0 never is, because nothing predicts it.
        line: line of the data set, from 1.
    """

    tokens: tuple[int, ...]
    supervised: tuple[bool, ...]
    line: int


def read_rows(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """Reads, checks and tokenises a data set.

    Rows are cut to their first ``max_length`` tokens; rows without a target after that are dropped. The log
    says how many.

    Args:
        path: a JSONL file in UTF-8; blank lines are skipped.
        tokenizer: the model's tokenizer.
        max_length: tokens per row, at least 2.

    Raises:
        DatasetError: the file cannot be read, a line is wrong (``where`` is ``file:line``), no row is left.
        ModelError: the tokenizer lacks the end-of-sequence token or the chat template that the form needs.
        UsageError: ``max_length`` is less than 2.
    """
    if max_length < 2:
        raise UsageError(
            f"a row of at most {max_length} tokens leaves nothing to predict",
            hint="Use a maximum length of at least 2",
        )
    return tokenise_rows(read_raw_rows(path), path, tokenizer, max_length)


# --- reading and checking


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


# --- tokenising


@dataclass(frozen=True)
class _Tokenised:
    tokens: list[int]
    context: int  # leading tokens that are given, not learned
    prompt_kept: bool = True  # whether the prompt's own tokens are a prefix of the whole


def tokenise_rows(
    raw_rows: Sequence[RawRow], path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Row]:
    """Tokenises checked rows, cuts them to ``max_length`` tokens and drops those without a target.

    ``path`` serves the error messages. Raises as `read_rows`.
    """
    rows: list[Row] = []
    cut = 0
    changed_prompts: list[int] = []
    for raw in raw_rows:
        tokenised = _tokenise(raw, path, tokenizer)
        cut += len(tokenised.tokens) > max_length
        if not tokenised.prompt_kept:
            changed_prompts.append(raw.line)
        tokens = tuple(tokenised.tokens[:max_length])
        supervised = tuple(i >= max(tokenised.context, 1) for i in range(len(tokens)))
        if any(supervised):
            rows.append(Row(tokens, supervised, raw.line))
    if changed_prompts:
        logger.warning(
            "%s: in %d rows (first: line %d) the prompt alone has other tokens than before its completion; "
            "the targets start where the two part. Strings: start the completion with the space instead of "
            "ending the prompt with it. Messages: use a chat template that renders a prompt alike in both",
            path,
            len(changed_prompts),
            changed_prompts[0],
        )
    if cut:
        logger.warning("%s: %d of %d rows were cut to %d tokens", path, cut, len(raw_rows), max_length)
    if not rows:
        raise DatasetError(
            f"none of the {len(raw_rows)} rows has a token to learn within its first {max_length} tokens",
            where=str(path),
            hint="Raise the maximum length, or give rows with shorter prompts",
        )
    if len(rows) < len(raw_rows):
        logger.warning(
            "%s: dropped %d of %d rows, which have no token to learn within their first %d tokens",
            path,
            len(raw_rows) - len(rows),
            len(raw_rows),
            max_length,
        )
    return rows


def _tokenise(raw: RawRow, path: Path, tokenizer: PreTrainedTokenizerBase) -> _Tokenised:
    where = f"{path}:{raw.line}"
    match raw.content:
        case TextForm(text=text):
            return _Tokenised(_encode(tokenizer, _with_eos(text, tokenizer, where)), context=0)
        case StringPair(prompt=prompt, completion=completion):
            whole = prompt + _with_eos(completion, tokenizer, where)
            return _after_prompt(_encode(tokenizer, prompt), _encode(tokenizer, whole))
        case Conversation(messages=messages):
            return _Tokenised(_render(tokenizer, messages, where), context=0)
        case MessagePair(prompt=turns, completion=answer):
            alone = _render(tokenizer, turns, where, add_generation_prompt=True)
            return _after_prompt(alone, _render(tokenizer, turns + answer, where))


def _after_prompt(prompt: list[int], whole: list[int]) -> _Tokenised:
    # As TRL: tokens may merge across the boundary, then the completion starts where the two sequences part.
    pairs = zip(prompt, whole, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return _Tokenised(whole, context=shared, prompt_kept=shared == len(prompt))


def _with_eos(text: str, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    eos = tokenizer.eos_token
    if eos is None:
        raise ModelError(
            f"the tokenizer '{tokenizer.name_or_path}' has no end-of-sequence token to end this row with",
            where=where,
            hint="Set eos_token in the model's tokenizer_config.json",
        )
    return text if text.endswith(eos) else text + eos


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text=text)["input_ids"])


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    where: str,
    *,
    add_generation_prompt: bool = False,
) -> list[int]:
    if tokenizer.chat_template is None:
        raise ModelError(
            f"the tokenizer '{tokenizer.name_or_path}' has no chat template, which lists of messages need",
            where=where,
            hint="Use an instruction-tuned model, or give prompt and completion as strings",
        )
    try:
        encoding: Any = tokenizer.apply_chat_template(
            [message.model_dump() for message in messages],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=add_generation_prompt,
        )
    except TemplateError as error:
        raise DatasetError(
            f"the model's chat template refuses these messages: {error}",
            where=where,
            hint="Use the roles, in the order, that the model's chat template expects",
        ) from error
    return list(encoding["input_ids"])
