"""Rows, token ids and loss masks are those of TRL's own `SFTTrainer`; docs/trl.md lists what differs."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, ScriptArguments, SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from cli.submit import submit
from cli.trl_options import RULES, translate
from hetrain.data.chat import training_template
from hetrain.data.packing import IGNORE_INDEX, micro_batches
from hetrain.public.errors import DatasetError
from tests.harness.trl_rows import (
    FORMS,
    TEMPLATES,
    assert_rows_equal,
    counts_in_loss,
    labels_of,
    our_rows,
    random_lines,
    trl_rows,
)

LONG = 1024
SAYS = {"role": "user", "content": "What sings?"}
ANSWERS = {"role": "assistant", "content": "Herrings."}


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2_dir)


def changed(tokenizer: PreTrainedTokenizerBase, **attributes: str) -> PreTrainedTokenizerBase:
    """A copy with other attributes."""
    other = copy.deepcopy(tokenizer)
    for name, value in attributes.items():
        setattr(other, name, value)
    return other


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    assert assert_rows_equal(random_lines(form, 150, seed=1), tokenizer, LONG, tmp_path) > 140


@pytest.mark.parametrize("max_length", [2, 9, 40])
@pytest.mark.parametrize("form", FORMS)
def test_truncation(form: str, max_length: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Rows are cut at their end, and prompts that leave no room for a target drop their row."""
    short = {"text": "a fish sings", "prompt": "a", "completion": " fish sings"}
    keep = {"text": ("text",), "strings": ("prompt", "completion")}.get(form)
    extra = [{name: short[name] for name in keep}] if keep else []
    lines = random_lines(form, 100, seed=2) + extra
    if form == "message pairs" and max_length < 40:  # the template alone is longer than that
        with pytest.raises(DatasetError, match="none of the 100 rows"):
            our_rows(lines, tokenizer, max_length, tmp_path)
        assert not trl_rows(lines, tokenizer, max_length, tmp_path)
        return
    count = assert_rows_equal(lines, tokenizer, max_length, tmp_path)
    assert 0 < count <= len(lines)


@pytest.mark.parametrize("form", FORMS[:2])
def test_end_of_sequence(form: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Another token than that of the chat template ends a row; one that is there is not doubled."""
    other = changed(tokenizer, eos_token="<|endoftext|>")
    last = "text" if form == "text" else "completion"
    lines = random_lines(form, 60, seed=3)
    lines += [line | {last: line[last] + "<|endoftext|>"} for line in lines[:20]]
    lines += [line | {last: line[last] + "<|endoftext|> "} for line in lines[:5]]
    assert assert_rows_equal(lines, other, LONG, tmp_path) == len(lines)
    assert all(row.tokens[-1] == other.eos_token_id for row in our_rows(lines, other, LONG, tmp_path))


@pytest.mark.parametrize("form", FORMS)
def test_a_tokenizer_that_adds_a_first_token(
    form: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    other = copy.deepcopy(tokenizer)
    first = ("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first[0]} $A", pair=f"{first[0]} $A $B", special_tokens=[first]
    )
    assert other("x")["input_ids"][0] == first[1]
    lines = random_lines(form, 40, seed=4)
    assert assert_rows_equal(lines, other, LONG, tmp_path) == len(lines)


@pytest.mark.parametrize("template", ["deepseekv3", "gemma3", "llama3", "phi3", "qwen3"])
@pytest.mark.parametrize("form", FORMS[2:])
def test_chat_templates(form: str, template: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Among them some that render a prompt alone otherwise than before its completion."""
    other = changed(tokenizer, chat_template=(TEMPLATES / f"{template}.jinja").read_text())
    assert_rows_equal(random_lines(form, 30, seed=5), other, LONG, tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_packed_rows(form: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A micro-batch has the tokens, positions and shifted labels of TRL's collator without padding."""
    lines = random_lines(form, 20, seed=6)
    ours = our_rows(lines, tokenizer, LONG, tmp_path)
    theirs = trl_rows(lines, tokenizer, LONG, tmp_path)
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    expected = collator(
        [{"input_ids": ids, "labels": labels} for ids, labels in theirs if counts_in_loss(labels)]
    )
    (batch,) = micro_batches(ours, [range(len(ours))])
    assert torch.equal(batch.tokens, expected["input_ids"][0])
    assert torch.equal(batch.positions, expected["position_ids"][0])
    after = torch.cat([expected["labels"][0, 1:], torch.tensor([IGNORE_INDEX])])
    assert torch.equal(batch.targets, after)
    assert torch.equal(torch.tensor([0, *batch.lengths]).cumsum(0), expected["cu_seq_lens_q"])


def with_template(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    return changed(tokenizer, chat_template=(TEMPLATES / f"{name}.jinja").read_text())


def test_conversations(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    lines = random_lines("conversations", 50, seed=8)
    assert assert_rows_equal(lines, tokenizer, LONG, tmp_path) == 50


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "llama3_2", "glm4moe", "gptoss"])
def test_tools(template: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    other = with_template(tokenizer, template)
    assert assert_rows_equal(random_lines("tools", 30, seed=9), other, LONG, tmp_path) == 30


def test_arguments_of_the_chat_template(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    other = with_template(tokenizer, "qwen3")
    thinking = {"chat_template_kwargs": {"enable_thinking": False}}
    lines = [line | thinking for line in random_lines("message pairs", 20, seed=10)]
    assert_rows_equal(lines, other, LONG, tmp_path)


@pytest.mark.parametrize("max_length", [60, LONG])
@pytest.mark.parametrize("form", ["strings", "message pairs"])
def test_prompts_can_be_learned(
    form: str, max_length: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    lines = random_lines(form, 60, seed=11)
    assert_rows_equal(lines, tokenizer, max_length, tmp_path, completion_only_loss=False)


@pytest.mark.parametrize("template", ["llama3", "phi3", "qwen2_5", "qwen3", "gemma3"])
@pytest.mark.parametrize("form", FORMS[2:])
def test_the_assistant_alone(
    form: str, template: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Templates without markers are those that TRL knows how to mark."""
    other = with_template(tokenizer, template)
    lines = random_lines(form, 30, seed=12)
    assert assert_rows_equal(lines, other, LONG, tmp_path, assistant_only_loss=True) > 20
    both = {"assistant_only_loss": True, "completion_only_loss": False}
    if form == "message pairs":
        assert assert_rows_equal(lines, other, LONG, tmp_path, **both) > 20


def test_the_assistant_alone_by_a_template_with_markers(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    other = with_template(tokenizer, "qwen3_training")
    lines = random_lines("messages", 30, seed=13)
    assert assert_rows_equal(lines, other, 60, tmp_path, assistant_only_loss=True) > 10


# --- the differences of docs/trl.md


def test_only_hetrain_marks_the_template_of_smollm2(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    lines = random_lines("messages", 50, seed=14)
    with pytest.raises(ValueError, match="not training-compatible"):
        trl_rows(lines, tokenizer, LONG, tmp_path, assistant_only_loss=True)
    marked = changed(tokenizer, chat_template=str(training_template(tokenizer)))
    # The marked template writes the same, and TRL takes it.
    assert_rows_equal(lines, marked, LONG, tmp_path)
    whole = our_rows(lines, tokenizer, LONG, tmp_path)
    assert our_rows(lines, marked, LONG, tmp_path) == whole
    assert_rows_equal(lines, marked, LONG, tmp_path, assistant_only_loss=True)
    alone = our_rows(lines, tokenizer, LONG, tmp_path, assistant_only_loss=True)
    assert alone == our_rows(lines, marked, LONG, tmp_path, assistant_only_loss=True)
    assert all(sum(a.supervised) < sum(b.supervised) for a, b in zip(alone, whole, strict=True))


def test_only_hetrain_reads_the_roles_of_sharegpt(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    said = [{"from": "human", "value": "What sings?"}, {"from": "gpt", "value": "Herrings."}]
    (row,) = our_rows([{"conversations": said}], tokenizer, LONG, tmp_path)
    assert our_rows([{"messages": [SAYS, ANSWERS]}], tokenizer, LONG, tmp_path) == [row]


def test_only_hetrain_reads_alpaca(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    alpaca = {"instruction": "Translate.", "input": "Hering", "output": "Herring"}
    asks = [{"role": "user", "content": "Translate.\n\nHering"}]
    pair = {"prompt": asks, "completion": [{"role": "assistant", "content": "Herring"}]}
    assert our_rows([alpaca], tokenizer, LONG, tmp_path) == our_rows([pair], tokenizer, LONG, tmp_path)
    assert_rows_equal([pair], tokenizer, LONG, tmp_path)


def test_only_hetrain_refuses_what_the_template_drops(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    qwen, llama = with_template(tokenizer, "qwen3"), with_template(tokenizer, "llama3")
    odd = [{"messages": [SAYS, ANSWERS]}, {"messages": [SAYS, {"role": "parrot", "content": "Squawk."}]}]
    assert len(trl_rows(odd, qwen, LONG, tmp_path)) == 2
    with pytest.raises(DatasetError, match="drops what 'parrot' says") as caught:
        our_rows(odd, qwen, LONG, tmp_path)
    assert caught.value.where.endswith(":2")
    with pytest.raises(DatasetError, match=r"drops (what|tool)"):
        our_rows(random_lines("tools", 1, seed=15), llama, LONG, tmp_path)


@pytest.mark.parametrize(
    "line", [{"text": "a fish"}, {"messages": [SAYS, ANSWERS]}], ids=["text", "messages"]
)
def test_only_trl_labels_the_first_token(
    line: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    ((ids, labels),) = trl_rows([line], tokenizer, LONG, tmp_path)
    (row,) = our_rows([line], tokenizer, LONG, tmp_path)
    assert labels == ids
    assert labels_of(row) == [IGNORE_INDEX, *ids[1:]]


def test_only_trl_keeps_rows_without_anything_to_predict(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    lines = [{"text": "<|im_end|>"}, {"text": "a fish"}]
    assert [len(ids) for ids, _ in trl_rows(lines, tokenizer, LONG, tmp_path)] == [1, 3]
    assert [row.line for row in our_rows(lines, tokenizer, LONG, tmp_path)] == [2]


@pytest.mark.parametrize(
    "line",
    [
        {"text": ""},
        {"prompt": "", "completion": "a fish"},
        {"prompt": "a fish", "completion": ""},
    ],
    ids=lambda line: "-".join(line),
)
def test_only_trl_accepts(line: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    assert len(trl_rows([line], tokenizer, LONG, tmp_path)) == 1
    with pytest.raises(DatasetError):
        our_rows([line], tokenizer, LONG, tmp_path)


def test_only_hetrain_refuses_a_data_set_of_which_nothing_is_left(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    lines = [{"prompt": "one two three", "completion": " four"}]
    assert trl_rows(lines, tokenizer, 3, tmp_path) == []
    with pytest.raises(DatasetError, match="none of the 1 rows"):
        our_rows(lines, tokenizer, 3, tmp_path)


def test_every_option_of_trl_is_taken_or_in_the_table() -> None:
    app = typer.Typer()
    app.command()(submit)
    names = {
        option.removeprefix("--").replace("-", "_")
        for parameter in typer.main.get_command(app).params
        for option in (*parameter.opts, str(parameter.name))
    }
    configs = (ScriptArguments, ModelConfig, SFTConfig)
    theirs = {field.name for config in configs for field in dataclasses.fields(config)}
    unknown = {
        name for name in theirs if translate({name: None}).spelled.get(name, name) not in names | set(RULES)
    }
    assert not unknown
    assert not names & set(RULES), "what is an option of its own needs no rule"
