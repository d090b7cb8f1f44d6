"""Messages as a model's chat template writes them, and which of its tokens the assistant says."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from hetrain.data.schema import Conversation, Message, MessagePair
from hetrain.public.errors import DatasetError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SENTINEL = "zqxhetrainqxz"
# What a template could leave out of a message.
_PARTS = ("content", "tool_calls", "reasoning_content", "name")

# ChatML, as in SmolLM2 and many others: what writes a message, and the same with the assistant's part marked.
_CHATML = re.compile(
    r"\{\{ ?'<\|im_start\|>' \+ message\['role'\] \+ '(\\n|\n)' \+ message\['content'\] \+ '<\|im_end\|>' \+ "
    r"'(?:\\n|\n)' ?\}\}"
)
_MARKED_CHATML = (
    "{{{{'<|im_start|>' + message['role'] + '{newline}'}}}}"
    "{{% if message['role'] == 'assistant' %}}{{% generation %}}{{{{message['content'] + '<|im_end|>'}}}}"
    "{{% endgeneration %}}{{% else %}}{{{{message['content'] + '<|im_end|>'}}}}{{% endif %}}"
    "{{{{'{newline}'}}}}"
)


@dataclass(frozen=True)
class Rendered:
    """Token ids, and of each whether the assistant says it, where that was asked for."""

    tokens: list[int]
    assistant: list[bool] | None = None


@dataclass
class ChatRenderer:
    """Writes conversations by one tokenizer's chat template.

    Attributes:
        tokenizer: has a chat template.
        marks_assistant: whether to find out what the assistant says; the template then is one that marks it.
        strict: whether to refuse also names of messages that the template drops, instead of a warning.
    """

    tokenizer: PreTrainedTokenizerBase
    marks_assistant: bool
    strict: bool = False
    _template: str | None = field(init=False, default=None)
    _tried: set[tuple[Any, ...]] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        if self.marks_assistant and self.tokenizer.chat_template is not None:
            self._template = training_template(self.tokenizer)

    def render_all(self, row: MessagePair | Conversation, where: str) -> Rendered:
        """A whole conversation. Raises as `render_prompt`, and if the template drops a part of it."""
        turns = row.messages if isinstance(row, Conversation) else row.prompt + row.completion
        encoding = self._apply(turns, row, where, return_assistant_tokens_mask=self.marks_assistant)
        self._require_whole(turns, row, where)
        if not self.marks_assistant:
            return Rendered(list(encoding["input_ids"]))
        assistant = [bool(bit) for bit in encoding["assistant_masks"]]
        if not any(assistant):
            hint = "Give each conversation an assistant's turn, or leave out `assistant_only_loss`"
            raise DatasetError("the assistant says nothing here", where=where, hint=hint)
        return Rendered(list(encoding["input_ids"]), assistant)

    def render_prompt(self, row: MessagePair, where: str) -> list[int]:
        """The prompt alone, with the generation prompt.

        Raises:
            ModelError: the tokenizer has no chat template.
            DatasetError: the template refuses the messages.
        """
        return list(self._apply(row.prompt, row, where, add_generation_prompt=True)["input_ids"])

    def _apply(
        self, turns: Sequence[Message], row: MessagePair | Conversation, where: str, **more: Any
    ) -> dict[str, Any]:
        if self.tokenizer.chat_template is None:
            raise ModelError(
                f"the tokenizer '{self.tokenizer.name_or_path}' has no chat template, which lists of "
                "messages need",
                where=where,
                hint="Use an instruction-tuned model, or give prompt and completion as strings",
            )
        messages = [turn.as_template_sees_it() for turn in turns]
        encoding: dict[str, Any] = self._render(messages, row.tools, row, where, return_dict=True, **more)
        return encoding

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        row: MessagePair | Conversation,
        where: str,
        **more: Any,
    ) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self._template, tools=tools, **row.chat_template_kwargs, **more
            )
        except (TemplateError, TypeError) as error:
            raise DatasetError(
                f"the model's chat template refuses these messages: {error}",
                where=where,
                hint="Use the roles, in the order, that the model's chat template expects",
            ) from error

    def _require_whole(self, turns: Sequence[Message], row: MessagePair | Conversation, where: str) -> None:
        """Tries whether the template writes a word in place of each part of a turn; once per kind of turn."""
        for place, turn in enumerate(turns):
            parts = [name for name in _PARTS if getattr(turn, name)]
            # Templates leave out what was thought before the last question.
            asked_again = any(later.role == "user" for later in turns[place + 1 :])
            kind = (turn.role, place == 0, place == len(turns) - 1, asked_again, *parts)
            if kind in self._tried:
                continue
            for name in parts:
                messages = [each.as_template_sees_it() for each in turns]
                calls = turn.tool_calls if name == "tool_calls" else None
                messages[place][name] = [_renamed(call) for call in calls] if calls else _SENTINEL
                if not self._writes(messages, row.tools, row, where):
                    self._drops(name, turn.role, where)
            self._tried.add(kind)
        if row.tools and ("tools",) not in self._tried:
            messages = [each.as_template_sees_it() for each in turns]
            if not self._writes(messages, [_renamed(tool) for tool in row.tools], row, where):
                self._refuse("drops tools", where)
            self._tried.add(("tools",))

    def _writes(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        row: MessagePair | Conversation,
        where: str,
    ) -> bool:
        return _SENTINEL in self._render(messages, tools, row, where, tokenize=False)

    def _drops(self, name: str, role: str, where: str) -> None:
        """Says that the template leaves out a part. Raises `DatasetError` if that would not be learned."""
        if name == "name" and not self.strict:
            if (name, role) not in self._tried:
                _log.warning("%s: the model's chat template drops `name` of '%s'", where, role)
                self._tried.add((name, role))
            return
        what = {"content": f"what '{role}' says", "tool_calls": "tool calls"}
        self._refuse(f"drops {what.get(name, f'`{name}` of {role!r}')}", where)

    def _refuse(self, what: str, where: str) -> None:
        raise DatasetError(
            f"the model's chat template {what}, so that it would not be learned",
            where=where,
            hint="Use roles and fields that the template writes, or give prompt and completion as strings",
        )


def _renamed(function: dict[str, Any]) -> dict[str, Any]:
    """A tool, or a call of one, under the name of the sentinel."""
    changed = deepcopy(function)
    inner = changed.get("function", changed)
    if isinstance(inner, dict):
        inner["name"] = _SENTINEL
    return changed


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template with the assistant's part marked; None if the tokenizer's own has it marked.

    Known are ChatML as SmolLM2 has it, and with trl installed all that TRL knows.

    Raises:
        ModelError: it is not known how to mark it.
    """
    own = tokenizer.chat_template
    template = own["default"] if isinstance(own, dict) else str(own)
    if _MARKER.search(template):
        return None
    if _CHATML.search(template):
        return _CHATML.sub(lambda match: _MARKED_CHATML.format(newline=match[1]), template)
    hint = "Give prompt and completion instead of messages, or mark it by {% generation %} in the template"
    what = "the chat template does not mark what the assistant says, as `assistant_only_loss` needs"
    try:
        from trl.chat_template_utils import get_training_chat_template
    except ImportError as error:
        hint = f'Install trl, which knows many templates: pip install "hetrain[data]". {hint}'
        raise ModelError(what, where=tokenizer.name_or_path, hint=hint) from error
    try:
        patched: str | None = get_training_chat_template(tokenizer)
    except (ValueError, TemplateError) as error:
        raise ModelError(what, where=tokenizer.name_or_path, hint=hint) from error
    return patched
