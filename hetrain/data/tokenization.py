"""Turns the rows of a data set into tokens and targets, as TRL 1.16 does."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

from hetrain.config import DataConfig
from hetrain.data.chat import ChatRenderer
from hetrain.data.dataset import RawRow, read_raw_rows
from hetrain.data.records import Problems
from hetrain.data.schema import Conversation, InstructionForm, Message, MessagePair, StringPair, TextForm
from hetrain.data.sources import HubSplit
from hetrain.public.errors import DatasetError, ModelError, UsageError
from hetrain.public.model.files import ModelFiles

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_DEFAULT = DataConfig()
# Stanford Alpaca's prompts, for models without a chat template.
_ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes "
)
_ALPACA += "the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
_ALPACA_MORE = ", paired with an input that provides further context"


@dataclass(frozen=True)
class Row:
    """One training sequence.

    Attributes:
        tokens: token ids, at least two.
        supervised: ``supervised[i]`` says whether token i is a target of the loss; at least one is, and
            token 0 never is, because nothing predicts it.
        line: line of its file, or row of a columnar one, from 1.
        prompt_length: how many of the first tokens are the prompt; 0 for a row without one.
    """

    tokens: tuple[int, ...]
    supervised: tuple[bool, ...]
    line: int
    prompt_length: int = 0


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


def read_rows(
    dataset: str | PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    config: DataConfig = _DEFAULT,
) -> list[Row]:
    """Reads, checks and tokenizes a data set; its training split if it is one of the hub.

    Raises:
        DatasetError: see `hetrain.data.dataset.read_job_rows` and `tokenize_rows`.
        ModelError: see `tokenize_rows`.
        UsageError: a setting needs another form, or ``max_length`` is less than 2.
    """
    raw = read_raw_rows((str(dataset),), config, HubSplit.to_train(config))
    return tokenize_rows(raw, tokenizer, max_length, config)


@dataclass(frozen=True)
class _Tokenized:
    tokens: list[int]
    targets: list[bool]
    prompt_kept: bool = True  # whether the prompt's own tokens are a prefix of the whole
    prompt_length: int = 0


def tokenize_rows(
    raw_rows: Sequence[RawRow],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    config: DataConfig = _DEFAULT,
) -> list[Row]:
    """Tokenizes checked rows.

    Rows are cut to their first ``max_length`` tokens; rows without a target after that are dropped, both
    with a warning in the log.

    Args:
        raw_rows: at least one.
        tokenizer: the model's tokenizer.
        max_length: tokens per row, at least 2.
        config: which tokens are targets.

    Raises:
        DatasetError: the chat template refuses rows or drops parts of them (the message names the first
            ten), or no row is left.
        ModelError: the tokenizer lacks the end-of-sequence token or the chat template that the form needs.
        UsageError: ``max_length`` is less than 2.
    """
    if max_length < 2:
        raise UsageError(
            f"a row of at most {max_length} tokens leaves nothing to predict",
            hint="Use a maximum length of at least 2",
        )
    tokenize = _Tokenizer(tokenizer, config)
    rows: list[Row] = []
    notes, problems = _Notes(raw_rows, max_length), Problems()
    for raw in raw_rows:
        try:
            tokenized = tokenize(raw)
        except DatasetError as error:
            problems.add(error)
            continue
        tokens = tuple(tokenized.tokens[:max_length])
        supervised = (False, *tokenized.targets[1:max_length])[: len(tokens)]
        notes.cut += len(tokenized.tokens) > max_length
        if not tokenized.prompt_kept:
            notes.changed_prompts.append(raw.where)
        if any(supervised):
            rows.append(Row(tokens, supervised, raw.line, min(tokenized.prompt_length, len(tokens))))
    problems.raise_any()
    notes.warn(len(rows))
    return rows


class _Notes:
    """What happened to rows, and is said once for all of them."""

    def __init__(self, raw_rows: Sequence[RawRow], max_length: int) -> None:
        self.cut = 0
        self.changed_prompts: list[str] = []
        self._count, self._max_length = len(raw_rows), max_length
        sources = dict.fromkeys(raw.source for raw in raw_rows)
        self._sources = ", ".join(itertools.islice(sources, 3)) + (", ..." if len(sources) > 3 else "")

    def warn(self, left: int) -> None:
        """Writes warnings to the log. Raises `DatasetError` if no row is left."""
        if self.changed_prompts:
            logger.warning(
                "%s: in %d rows (first: %s) the prompt alone has other tokens than before its completion; "
                "the targets start where the two part. Strings: start the completion with the space instead "
                "of ending the prompt with it. Messages: use a chat template that renders a prompt alike in "
                "both",
                self._sources,
                len(self.changed_prompts),
                self.changed_prompts[0],
            )
        cut = "%s: %d of %d rows were cut to %d tokens"
        if self.cut:
            logger.warning(cut, self._sources, self.cut, self._count, self._max_length)
        if not left:
            raise DatasetError(
                f"none of the {self._count} rows has a token to learn within its first {self._max_length} "
                "tokens",
                where=self._sources,
                hint="Raise the maximum length, or give rows with shorter prompts",
            )
        dropped = "%s: dropped %d of %d rows, which have no token to learn within their first %d tokens"
        if left < self._count:
            logger.warning(dropped, self._sources, self._count - left, self._count, self._max_length)


class _Tokenizer:
    """Tokenizes one row after another. Raises as `tokenize_rows`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
        self._tokenizer = tokenizer
        self._learns_prompts = config.completion_only_loss is False
        self._renderer = ChatRenderer(tokenizer, config.assistant_only_loss, config.strict)

    def __call__(self, raw: RawRow) -> _Tokenized:
        content = raw.content
        if isinstance(content, InstructionForm):
            content = self._pair_of(content)
        match content:
            case TextForm(text=text):
                tokens = self._encode(self._with_eos(text, raw.where))
                return _Tokenized(tokens, [True] * len(tokens))
            case StringPair(prompt=prompt, completion=completion):
                tokens = self._encode(prompt + self._with_eos(completion, raw.where))
                return self._after_prompt(self._encode(prompt), tokens, [True] * len(tokens))
            case Conversation():
                whole = self._renderer.render_all(content, raw.where)
                return _Tokenized(whole.tokens, whole.assistant or [True] * len(whole.tokens))
            case MessagePair():
                whole = self._renderer.render_all(content, raw.where)
                alone = self._renderer.render_prompt(content, raw.where)
                said = whole.assistant or [True] * len(whole.tokens)
                return self._after_prompt(alone, whole.tokens, said)

    def _after_prompt(self, prompt: list[int], whole: list[int], said: list[bool]) -> _Tokenized:
        # As TRL: tokens may merge across the boundary, then the completion starts where the two part.
        pairs = zip(prompt, whole, strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        first = 0 if self._learns_prompts else shared
        targets = [said_here and place >= first for place, said_here in enumerate(said)]
        return _Tokenized(whole, targets, prompt_kept=shared == len(prompt), prompt_length=shared)

    def _pair_of(self, row: InstructionForm) -> MessagePair | StringPair:
        """A question and an answer by the chat template; Stanford Alpaca's prompt where there is none."""
        if self._tokenizer.chat_template is None:
            more, given = (_ALPACA_MORE, f"### Input:\n{row.input}\n\n") if row.input else ("", "")
            prompt = _ALPACA.format(more=more, instruction=row.instruction, input=given)
            return StringPair(prompt=prompt, completion=row.output)
        question = f"{row.instruction}\n\n{row.input}" if row.input else row.instruction
        return MessagePair(
            prompt=[Message(role="user", content=question)],
            completion=[Message(role="assistant", content=row.output)],
        )

    def _with_eos(self, text: str, where: str) -> str:
        eos: str | None = self._tokenizer.eos_token
        if eos is None:
            raise ModelError(
                f"the tokenizer '{self._tokenizer.name_or_path}' has no end-of-sequence token to end this "
                "row with",
                where=where,
                hint="Set eos_token in the model's tokenizer_config.json",
            )
        return text if text.endswith(eos) else text + eos

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text=text)["input_ids"])
