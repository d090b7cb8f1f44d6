"""Turns the rows of a data set into tokens and targets, as TRL 1.16 does with its defaults."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from hetrain.data.schema import (
    Conversation,
    Message,
    MessagePair,
    RawRow,
    StringPair,
    TextForm,
    read_raw_rows,
)
from hetrain.public.errors import DatasetError, ModelError, UsageError
from hetrain.public.model.files import ModelFiles

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


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


def load_tokenizer(files: ModelFiles) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises `ModelError` if there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            files.directory, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the tokenizer cannot be loaded: {error}", where=str(files.directory)) from error
    return tokenizer


def read_rows(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """Reads, checks and tokenizes a data set.

    Rows are cut to their first ``max_length`` tokens; rows without a target after that are dropped,
    both with a warning in the log.

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
    return tokenize_rows(read_raw_rows(path), path, tokenizer, max_length)


@dataclass(frozen=True)
class _Tokenized:
    tokens: list[int]
    context: int  # leading tokens that are given, not learned
    prompt_kept: bool = True  # whether the prompt's own tokens are a prefix of the whole


def tokenize_rows(
    raw_rows: Sequence[RawRow], path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Row]:
    """Tokenizes checked rows, cuts them to ``max_length`` tokens and drops those without a target.

    ``path`` serves the error messages. Raises as `read_rows`.
    """
    rows: list[Row] = []
    cut = 0
    changed_prompts: list[int] = []
    for raw in raw_rows:
        tokenized = _tokenize(raw, path, tokenizer)
        cut += len(tokenized.tokens) > max_length
        if not tokenized.prompt_kept:
            changed_prompts.append(raw.line)
        tokens = tuple(tokenized.tokens[:max_length])
        supervised = tuple(i >= max(tokenized.context, 1) for i in range(len(tokens)))
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


def _tokenize(raw: RawRow, path: Path, tokenizer: PreTrainedTokenizerBase) -> _Tokenized:
    where = f"{path}:{raw.line}"
    match raw.content:
        case TextForm(text=text):
            return _Tokenized(_encode(tokenizer, _with_eos(text, tokenizer, where)), context=0)
        case StringPair(prompt=prompt, completion=completion):
            whole = prompt + _with_eos(completion, tokenizer, where)
            return _after_prompt(_encode(tokenizer, prompt), _encode(tokenizer, whole))
        case Conversation(messages=messages):
            return _Tokenized(_render(tokenizer, messages, where), context=0)
        case MessagePair(prompt=turns, completion=answer):
            alone = _render(tokenizer, turns, where, add_generation_prompt=True)
            return _after_prompt(alone, _render(tokenizer, turns + answer, where))


def _after_prompt(prompt: list[int], whole: list[int]) -> _Tokenized:
    # As TRL: tokens may merge across the boundary, then the completion starts where the two sequences part.
    pairs = zip(prompt, whole, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return _Tokenized(whole, context=shared, prompt_kept=shared == len(prompt))


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
