"""Rows as TRL's `SFTTrainer` prepares them, and random data sets of every form to compare ours with."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import trl
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from hetrain.config import DataConfig
from hetrain.data.packing import IGNORE_INDEX
from hetrain.data.tokenization import Row, read_rows

datasets.disable_caching()
datasets.disable_progress_bars()

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
FORMS = ("text", "strings", "message pairs", "messages")
Line = dict[str, Any]

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of the next days.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}

_PIECES = (
    "Herrings", " sing", " at dusk", ".", "\n", "  ", " ", "é", "e\u0301", "漢字", "🐟🐠", "\u2028", "\t",
    "12345", "<|im_end|>",
    "<|im_start|>", "<|endoftext|>", "don't", "sk", "du", "\r\n", "</think>", "{{ x }}", "%",
)  # fmt: skip


def trl_rows(
    lines: Sequence[Line],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    directory: Path,
    **options: Any,
) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of the rows on which TRL would train, with options of its `SFTConfig`."""
    tiny = LlamaConfig(
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
    )
    trainer = SFTTrainer(
        model=LlamaForCausalLM(tiny),
        args=SFTConfig(
            str(directory / "trl"),
            max_length=max_length,
            use_cpu=True,
            bf16=False,
            report_to="none",
            **options,
        ),
        train_dataset=Dataset.from_list(list(lines)),
        processing_class=copy.deepcopy(tokenizer),
    )
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def our_rows(
    lines: Sequence[Line],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    directory: Path,
    **options: Any,
) -> list[Row]:
    """The rows on which hetrain would train, with settings of `DataConfig`."""
    path = directory / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return read_rows(path, tokenizer, max_length, DataConfig(**options))


def labels_of(row: Row) -> list[int]:
    """The row's targets as TRL writes them."""
    return [
        token if counts else IGNORE_INDEX for token, counts in zip(row.tokens, row.supervised, strict=True)
    ]


def counts_in_loss(labels: Sequence[int]) -> bool:
    """Whether a model is trained on anything: its prediction for token 0 is never asked for."""
    return any(label != IGNORE_INDEX for label in labels[1:])


def random_lines(form: str, count: int, seed: int) -> list[Line]:
    """A data set of one form; the same for the same arguments."""
    chance = random.Random(f"{form}/{seed}")

    def text() -> str:
        return "".join(chance.choices(_PIECES, k=chance.randint(1, 30)))

    def turns(first: str, roles: tuple[str, str], number: int) -> list[Line]:
        system = [{"role": "system", "content": text()}] if first == "system" else []
        return system + [{"role": roles[index % 2], "content": text()} for index in range(number)]

    def calls(question: Line) -> Line:
        call = {"type": "function", "function": {"name": "weather", "arguments": {"city": text(), "days": 3}}}
        asks: Line = {"role": "assistant", "content": None, "tool_calls": [call]}
        tells = {"role": "tool", "name": "weather", "content": text()}
        messages = [question, asks, tells, {"role": "assistant", "content": text()}]
        return {"messages": messages, "tools": [WEATHER]}

    def line() -> Line:
        first = chance.choice(("system", "user"))
        if form == "text":
            return {"text": text()}
        if form == "strings":
            return {"prompt": text(), "completion": text()}
        if form == "tools":
            return calls({"role": "user", "content": text()})
        if form == "conversations":
            said = turns("system", ("user", "assistant"), 2)
            return {"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in said]}
        questions = turns(first, ("user", "assistant"), 2 * chance.randint(0, 2) + 1)
        answer = [{"role": "assistant", "content": text()}]
        return (
            {"messages": questions + answer}
            if form == "messages"
            else {"prompt": questions, "completion": answer}
        )

    return [line() for _ in range(count)]


def assert_rows_equal(
    lines: Sequence[Line],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    directory: Path,
    **options: Any,
) -> int:
    """Same rows in the same order, same token ids, same targets. Returns their number.

    Two differences change no loss: TRL labels token 0, which nothing predicts, and keeps rows without any
    other label.
    """
    theirs = [
        row for row in trl_rows(lines, tokenizer, max_length, directory, **options) if counts_in_loss(row[1])
    ]
    ours = our_rows(lines, tokenizer, max_length, directory, **options)
    assert [list(row.tokens) for row in ours] == [ids for ids, _ in theirs]
    assert [labels_of(row)[1:] for row in ours] == [labels[1:] for _, labels in theirs]
    assert not any(row.supervised[0] for row in ours)
    return len(ours)
