"""Questions to an adapter: generation with stock transformers and peft, in clear on this machine."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from hetrain.data.prompts import PromptTemplate
from hetrain.export.loading import load_adapted, open_adapter
from hetrain.nn.adapter_files import read_job
from hetrain.public.errors import UsageError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generation:
    """How answers are generated.

    Attributes:
        max_new_tokens: the most tokens of an answer.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        seed: of the draws.
        batch_size: questions that are answered at once.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("temperature", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if not least <= value < math.inf:  # nan neither
                raise UsageError(f"{value} is no number from {least} on", field=name)


class Respondent:
    """A base model with its adapter, ready to answer.

    Args:
        adapter: see `open_adapter`.
        model: see `open_adapter`.
        template: how a question is worded; None takes that of the training rows, and for an adapter without
            records the chat template where there is one.
        device: torch device to compute on.

    Raises:
        UsageError: there is no adapter, or it does not fit the base model.
        ModelError: the base model cannot be found or loaded.
    """

    def __init__(
        self, adapter: Path, model: str | None = None, template: str | None = None, device: str = "cpu"
    ) -> None:
        source = open_adapter(adapter, model)
        self._tokenizer = source.tokenizer()
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self.template = _template(adapter, template, self._tokenizer)
        self._device = device
        self._model: PeftModel = load_adapted(source, device)
        self._ends = _ends(self._model, self._tokenizer)
        _log.info("asking in clear, on this machine, as %s", self.template)

    def answer(
        self, questions: Sequence[str], generation: Generation | None = None, *, adapted: bool = True
    ) -> list[str]:
        """The answers, without surrounding blanks.

        Args:
            questions: texts; each is worded by the template.
            generation: how; None is greedy.
            adapted: false asks the base model alone.

        Raises:
            UsageError: a question is empty.
        """
        how = generation or Generation()
        if not all(question.strip() for question in questions):
            raise UsageError("a question is empty", hint="ask something")
        prompts = [self.template.apply(question, self._tokenizer) for question in questions]
        torch.manual_seed(how.seed)
        answers: list[str] = []
        with nullcontext() if adapted else self._model.disable_adapter():
            for start in range(0, len(prompts), how.batch_size):
                answers += self._generate(prompts[start : start + how.batch_size], how)
        return answers

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[str], how: Generation) -> list[str]:
        # A chat template has written the special tokens already.
        inputs = self._tokenizer(
            list(prompts), return_tensors="pt", padding=True, add_special_tokens=not self.template.is_chat
        ).to(self._device)
        sampling = (
            {"do_sample": True, "temperature": how.temperature} if how.temperature else {"do_sample": False}
        )
        output = self._model.generate(
            **inputs,
            max_new_tokens=how.max_new_tokens,
            pad_token_id=self._tokenizer.pad_token_id,
            eos_token_id=self._ends or None,
            **sampling,
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self._tokenizer.batch_decode(new, skip_special_tokens=True)]


def _ends(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the model's own, such as the end of a turn, and the tokenizer's."""
    own = model.generation_config.eos_token_id
    tokens = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return sorted(tokens - {None})


def _template(adapter: Path, given: str | None, tokenizer: PreTrainedTokenizerBase) -> PromptTemplate:
    if given is not None:
        return PromptTemplate.parse(given)
    recorded = read_job(adapter).get("prompt")
    if recorded is not None:
        return PromptTemplate(**recorded)
    return PromptTemplate(is_chat=tokenizer.chat_template is not None)
