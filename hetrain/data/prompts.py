"""How a data set words its prompts, so that a question can be put to the adapter in the same way."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hetrain.data.tokenization import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUESTION = "\x00question\x00"


@dataclass(frozen=True)
class PromptTemplate:
    """A question becomes the chat template's rendering of one user message, or prefix + question + suffix."""

    is_chat: bool
    prefix: str = ""
    suffix: str = ""

    @classmethod
    def parse(cls, text: str) -> PromptTemplate:
        """From a text with ``{}`` in the place of the question; without it, the text is a prefix."""
        prefix, _, suffix = text.partition("{}")
        return cls(False, prefix, suffix)

    def apply(self, question: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """The prompt. A question that brings prefix and suffix along is taken as it is."""
        if self.is_chat:
            return _chat(tokenizer, question)
        if question.startswith(self.prefix) and question.endswith(self.suffix):
            return question
        return f"{self.prefix}{question}{self.suffix}"

    def __str__(self) -> str:
        return "the chat template" if self.is_chat else repr(f"{self.prefix}{{}}{self.suffix}")


def prompt_template(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> PromptTemplate:
    """The template of the rows' prompts; of rows without one, those are the tokens before the first target.

    It is the chat template where rows were rendered with it. Otherwise it is what all prompts share: the
    beginning up to a colon and a space or a line's end, and the end from a line's end on; of fewer than two
    different prompts, nothing.
    """
    if tokenizer.chat_template is not None:
        before_answer = _chat(tokenizer, _QUESTION).partition(_QUESTION)[2]
        if before_answer.strip() and before_answer in tokenizer.decode(rows[0].tokens):
            return PromptTemplate(True)
    prompts = {
        tokenizer.decode(
            row.tokens[: row.prompt_length or row.supervised.index(True)], skip_special_tokens=True
        )
        for row in rows
    }
    if len(prompts) < 2:
        return PromptTemplate(False)
    first = _common(list(prompts))
    last = _common([prompt[::-1] for prompt in prompts])[::-1]
    prefix = re.match(r"(?s).*(?:: |\n)", first)
    suffix = re.search(r"(?s)\n.*", last)
    return PromptTemplate(False, prefix[0] if prefix else "", suffix[0] if suffix else "")


def _common(texts: Sequence[str]) -> str:
    """The longest prefix of all."""
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in alike)


def _chat(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    message = {"role": "user", "content": question}
    return str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
