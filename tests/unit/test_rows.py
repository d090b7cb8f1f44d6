"""Reading, tokenising and packing a data set."""

from __future__ import annotations

import copy
import itertools
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hetrain.config import DataConfig
from hetrain.data.packing import (
    IGNORE_INDEX,
    MicroBatch,
    count_micro_batches,
    epoch_tokens,
    epochs,
    micro_batches,
    pack,
)
from hetrain.data.shared_prompt import shared_prompts
from hetrain.data.tokenization import Row, read_rows
from hetrain.public.errors import DatasetError, ModelError, UsageError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
)


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2_dir)


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write(folder: Path, *lines: Any) -> Path:
    """Writes a data set: bytes as they are, anything else as JSON."""
    path = folder / "data.jsonl"
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))
    return path


def read_one(folder: Path, tokenizer: PreTrainedTokenizerBase, line: Any) -> tuple[str, str]:
    """The row of a one-line data set, as text: all of it, and its targets."""
    (row,) = read_rows(write(folder, line), tokenizer, 512)
    targets = [token for token, counts in zip(row.tokens, row.supervised, strict=True) if counts]
    return tokenizer.decode(row.tokens), tokenizer.decode(targets)


# --- the forms


def test_text_is_learned_up_to_one_eos(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for text in ("Herrings sing at dusk.", "Herrings sing at dusk.<|im_end|>"):
        whole, targets = read_one(tmp_path, tokenizer, {"text": text})
        assert whole == "Herrings sing at dusk.<|im_end|>"
        assert whole == "H" + targets  # nothing predicts the first token


def test_string_completion_is_learned_and_its_prompt_is_not(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    line = {"prompt": "Question: What sings?\nAnswer:", "completion": " Herrings, at dusk."}
    whole, targets = read_one(tmp_path, tokenizer, line)
    assert whole == "Question: What sings?\nAnswer: Herrings, at dusk.<|im_end|>"
    assert targets == " Herrings, at dusk.<|im_end|>"


def test_message_completion_is_learned_after_the_generation_prompt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    line = {"prompt": [say("user", "What sings?")], "completion": [say("assistant", "Herrings.")]}
    whole, targets = read_one(tmp_path, tokenizer, line)
    prompt = SYSTEM + "<|im_start|>user\nWhat sings?<|im_end|>\n<|im_start|>assistant\n"
    assert whole == prompt + "Herrings.<|im_end|>\n"
    assert targets == "Herrings.<|im_end|>\n"


def test_messages_are_learned_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [say("system", "Be brief."), say("user", "What sings?"), say("assistant", "Herrings.")]
    whole, targets = read_one(tmp_path, tokenizer, {"messages": turns})
    assert whole == "".join(f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in turns)
    assert whole == "<|im_start|>" + targets


def test_completion_starts_where_a_merged_token_does(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"prompt": "They sing at du", "completion": "sk by the sea."}
    with caplog.at_level(logging.WARNING, logger="hetrain"):
        rows = read_rows(path := write(tmp_path, row, row, row), tokenizer, 512)
    assert tokenizer.decode([t for t, on in zip(rows[0].tokens, rows[0].supervised, strict=True) if on]) == (
        " dusk by the sea.<|im_end|>"
    )
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"in 3 rows (first: {path}:1)" in caplog.text


def test_blank_lines_a_byte_order_mark_and_line_separators_in_strings_are_fine(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = "Two\u2028lines."
    body = json.dumps({"text": text}, ensure_ascii=False).encode()
    rows = read_rows(write(tmp_path, b"\xef\xbb\xbf" + body + b"\r", b"", b"  \t", body, b""), tokenizer, 512)
    assert [row.line for row in rows] == [1, 4]
    assert {tokenizer.decode(row.tokens) for row in rows} == {text + "<|im_end|>"}


# --- the errors


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (b'{"text": "x"', "not JSON"),
        (b'{"text": "x"} {"text": "y"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"text": "caf\xe9"}', "byte 14 of this line is not UTF-8"),
        (b'{"text": "\\ud800"}', "'text' contains half of a surrogate pair"),
        (["text"], "not a JSON object"),
        ({}, "it has none"),
        ({"txt": "x", "id": 4}, "it has 'txt', 'id'"),
        ({"text": 7}, "'text' must be a string"),
        ({"text": None}, "'text' must be a string"),
        ({"text": ""}, "'text' is empty"),
        ({"prompt": "x"}, "'completion' is missing"),
        ({"completion": "x"}, "'prompt' is missing"),
        ({"prompt": "x", "completion": ""}, "'completion' is empty"),
        ({"prompt": "x", "completion": {}}, "'completion' must be a string"),
        (
            {"prompt": "x", "completion": [say("assistant", "y")]},
            "one is a list of messages and the other is not",
        ),
        ({"prompt": [say("user", "x")], "completion": []}, "'completion' is empty"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": "x"}, "'messages' must be a list of messages"),
        ({"messages": ["x"]}, "'messages[0]' must be an object with role and content"),
        ({"messages": [say("user", "x"), {"role": "user"}]}, "'messages[1]' has no content"),
        ({"messages": [say("user", "x"), say("assistant", "")]}, "'messages[1]' has an empty content"),
        (b'{"text": "x", "text": "y"}', "the key 'text' stands there twice"),
        (b'{"messages": [{"role": "user", "role": "system", "content": "x"}]}', "'role' stands there twice"),
        ({"instruction": "x", "input": "y"}, "'output' is missing"),
        ({"conversations": [{"from": "human"}]}, "'conversations[0]' has no content"),
        (
            {"conversations": [{"from": "Hooman", "value": "x"}]},
            "a turn from 'Hooman', which is no known role",
        ),
        ({"conversations": [{"from": 4, "value": "x"}]}, "'conversations[0].role' must be a string"),
        ({"messages": [say("user", "x")], "chat_template_kwargs": {"chat_template": "y"}}, "'chat_template'"),
        ({"messages": [say("user", "x")]}, "has the form 'messages', but line 2 has the form 'text'"),
        ({"prompt": "x", "completion": "y"}, "'prompt and completion as strings', but line 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "line",
)
def test_a_bad_line_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, bad: Any, what: str) -> None:
    path = write(tmp_path, b"", {"text": "good"}, b"", bad, {"text": "good"})
    with pytest.raises(DatasetError) as caught:
        read_rows(path, tokenizer, 512)
    assert caught.value.where == f"{path}:4"
    assert what in caught.value.what
    assert caught.value.hint


def test_string_and_message_pairs_do_not_mix(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    lists = {"prompt": [say("user", "x")], "completion": [say("assistant", "y")]}
    with pytest.raises(DatasetError, match="one form per file") as caught:
        read_rows(write(tmp_path, lists, {"prompt": "x", "completion": "y"}), tokenizer, 512)
    assert caught.value.where.endswith("data.jsonl:2")


def test_errors_do_not_repeat_private_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for bad in ({"text": ["the safe's code"]}, b'{"text": "the safe\'s code}'):
        with pytest.raises(DatasetError) as caught:
            read_rows(write(tmp_path, bad), tokenizer, 512)
        assert "safe" not in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize("lines", [(), (b"", b"   ")])
def test_an_empty_file_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, lines: tuple[bytes, ...]
) -> None:
    with pytest.raises(DatasetError, match="is empty") as caught:
        read_rows(write(tmp_path, *lines), tokenizer, 512)
    assert caught.value.hint


def test_an_unreadable_file_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path, {"text": "x"}).with_name("dat.jsonl")
    with pytest.raises(DatasetError, match=r"cannot be read.*did you mean data\.jsonl\?") as caught:
        read_rows(path, tokenizer, 512)
    assert caught.value.where == str(path)


def test_a_tokenizer_without_what_the_form_needs_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = tokenizer.chat_template = None
    for line, lack in (
        ({"text": "x"}, "end-of-sequence"),
        ({"prompt": "x", "completion": "y"}, "end-of-sequence"),
        ({"messages": [say("user", "x")]}, "chat template"),
        ({"prompt": [say("user", "x")], "completion": [say("assistant", "y")]}, "chat template"),
    ):
        with pytest.raises(ModelError, match=lack) as caught:
            read_rows(write(tmp_path, line), tokenizer, 512)
        assert caught.value.where.endswith("data.jsonl:1")
        assert caught.value.hint


def test_messages_that_the_chat_template_refuses_are_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'parrot' %}{{ raise_exception('no parrots') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    lines = [{"messages": [say("user", "x y z")]}, {"messages": [say("parrot", "x")]}]
    with pytest.raises(DatasetError, match="no parrots") as caught:
        read_rows(write(tmp_path, *lines), tokenizer, 512)
    assert caught.value.where.endswith("data.jsonl:2")


THINKING = (
    "{% set last = namespace(question=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{{ m.role }}: "
    "{% if m.reasoning_content and loop.index0 > last.question %}({{ m.reasoning_content }}) {% endif %}"
    "{{ m.content }}\n{% endfor %}"
)


def test_reasoning_and_names_that_the_chat_template_drops_are_said(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = THINKING
    asks, thinks = say("user", "What sings?"), say("assistant", "Herrings.") | {"reasoning_content": "Fish?"}
    once, twice = [asks, thinks], [asks, thinks, asks, say("assistant", "Herrings.")]
    tools = [asks, thinks, say("tool", "Yes."), say("assistant", "Herrings.")]
    rows = read_rows(write(tmp_path, {"messages": once}, {"messages": tools}), thinking, 512)
    assert all("(Fish?) Herrings." in thinking.decode(row.tokens) for row in rows)
    pair = {"prompt": once[:1], "completion": once[1:]}
    for lines, template in (
        ([{"messages": once}], tokenizer),
        ([pair], tokenizer),
        ([{"messages": tools}, {"messages": twice}], thinking),
    ):
        with pytest.raises(DatasetError, match="drops `reasoning_content` of 'assistant'") as caught:
            read_rows(write(tmp_path, *lines), template, 512)
        assert caught.value.where.endswith(f":{len(lines)}")
    named = {"messages": [asks | {"name": "ann"}, asks | {"name": "ann"}]}
    path = write(tmp_path, named, named)
    with caplog.at_level(logging.WARNING, logger="hetrain"):
        read_rows(path, tokenizer, 512)
    (record,) = caplog.records
    assert f"{path}:1: the model's chat template drops `name` of 'user'" in record.getMessage()
    with pytest.raises(DatasetError, match="drops `name` of 'user'"):
        read_rows(path, tokenizer, 512, DataConfig(strict=True))
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.name }}: {{ m.content }}{% endfor %}"
    assert len(read_rows(path, tokenizer, 512, DataConfig(strict=True))) == 2


# --- cutting and dropping


def test_long_rows_are_cut_and_rows_without_targets_dropped(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [{"prompt": "one two" + " three" * n, "completion": " four five six"} for n in (0, 1, 3, 8)]
    full = read_rows(write(tmp_path, *lines), tokenizer, 512)
    with caplog.at_level(logging.WARNING, logger="hetrain"):
        rows = read_rows(write(tmp_path, *lines), tokenizer, 5)
    # prompts of 2, 3, 5 and 10 tokens: the last two leave no target within five
    assert [(row.line, row.tokens, row.supervised) for row in rows] == [
        (row.line, row.tokens[:5], row.supervised[:5]) for row in full[:2]
    ]
    assert [sum(row.supervised) for row in rows] == [3, 2]
    assert "4 of 4 rows were cut to 5 tokens" in caplog.text
    assert "dropped 2 of 4 rows" in caplog.text


def test_it_is_an_error_when_nothing_is_left(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path, {"prompt": "one two three", "completion": " four"})
    with pytest.raises(DatasetError, match="none of the 1 rows"):
        read_rows(path, tokenizer, 3)
    with pytest.raises(UsageError, match="nothing to predict"):
        read_rows(path, tokenizer, 1)


# --- packing


@st.composite
def data_sets(draw: st.DrawFn) -> tuple[list[Row], int]:
    """Rows whose tokens are all different but for a prompt of some, and a budget that holds the longest."""
    lengths = draw(st.lists(st.integers(2, 12), min_size=1, max_size=40))
    prompt = tuple(range(-draw(st.integers(0, 8)), 0))
    fresh = itertools.count()
    rows = []
    for line, length in enumerate(lengths, start=1):
        begin = prompt if draw(st.booleans()) else ()
        context = draw(st.integers(1, length + len(begin) - 1))
        tokens = begin + tuple(itertools.islice(fresh, length))
        rows.append(Row(tokens, tuple(context <= i for i in range(len(tokens))), line))
    longest = max(len(row.tokens) for row in rows)
    return rows, draw(st.integers(longest, 40))


def unpack(batch: MicroBatch) -> list[tuple[list[int], list[int], list[int]]]:
    targets = batch.targets.split(list(batch.lengths))
    return [
        (batch.tokens[places].tolist(), batch.positions[places].tolist(), each.tolist())
        for places, each in zip(batch.places, targets, strict=True)
    ]


@given(data_sets(), st.integers(0, 2**64), st.integers(1, 3))
def test_every_epoch_packs_every_row_once_and_whole(
    data_set: tuple[list[Row], int], seed: int, n_epochs: int
) -> None:
    rows, max_tokens = data_set
    by_tokens = {row.tokens: row for row in rows}
    batches = list(epochs(rows, max_tokens, seed, n_epochs))
    assert [batch.index for batch in batches] == list(
        range(count_micro_batches(rows, max_tokens, seed, n_epochs))
    )
    seen: Counter[tuple[int, ...]] = Counter()
    for batch in batches:
        assert {part.dtype for part in (batch.tokens, batch.positions, batch.targets)} == {torch.int64}
        assert batch.n_tokens == len(batch.positions) <= max_tokens
        assert torch.cat(batch.places).unique().tolist() == list(range(batch.n_tokens))
        n_targets = 0
        for tokens, positions, targets in unpack(batch):
            row = by_tokens[tuple(tokens)]
            seen[row.tokens] += 1
            assert positions == list(range(len(tokens)))
            for i, target in enumerate(targets):
                learned = i + 1 < len(tokens) and row.supervised[i + 1]
                assert target == (row.tokens[i + 1] if learned else IGNORE_INDEX)
            n_targets += sum(row.supervised)
        assert batch.n_targets == n_targets > 0
    assert seen == dict.fromkeys(by_tokens, n_epochs)
    first = count_micro_batches(rows, max_tokens, seed, 1)
    assert epoch_tokens(rows, max_tokens, seed) == sum(batch.n_tokens for batch in batches[:first])


@given(data_sets(), st.randoms(use_true_random=False), st.booleans())
def test_pack_is_first_fit(data_set: tuple[list[Row], int], shuffler: Any, shares: bool) -> None:
    rows, max_tokens = data_set
    prompts = shared_prompts(rows) if shares else (0,) * len(rows)
    order = list(range(len(rows)))
    shuffler.shuffle(order)

    def computed(members: list[int]) -> int:
        return sum(len(rows[i].tokens) - prompts[i] for i in members) + max(prompts[i] for i in members)

    expected: list[list[int]] = []
    for index in order:
        for members in expected:
            if computed([*members, index]) <= max_tokens:
                members.append(index)
                break
        else:
            expected.append([index])
    packed = pack(rows, max_tokens, order, prompts if shares else None)
    assert packed == [tuple(members) for members in expected]
    batches = micro_batches(rows, packed, prompts)
    assert [batch.n_tokens for batch in batches] == [computed(members) for members in expected]


def rows_of(*tokens: tuple[int, ...]) -> list[Row]:
    return [Row(each, (False,) + (True,) * (len(each) - 1), line) for line, each in enumerate(tokens, 1)]


def test_the_shared_prompt_is_the_beginning_that_saves_most() -> None:
    system = (1, 2, 3)
    same = [(*system, 4, 10), (*system, 4, 11), (*system, 5, 12), (*system, 6, 13)]
    assert shared_prompts(rows_of(*same)) == (3, 3, 3, 3)  # 3·3 tokens, more than 4·1
    long = [(*system, *range(20, 30), 10), (*system, *range(20, 30), 11)]
    assert shared_prompts(rows_of(*same, *long)) == (3,) * 6  # 3·5 tokens, more than 13·1
    assert shared_prompts(rows_of(*same[:2], *long)) == (0, 0, 13, 13)
    assert shared_prompts(rows_of(*same, (1, 2), (9, 9, 9), system)) == (3, 3, 3, 3, 0, 0, 0)
    assert shared_prompts(rows_of(system, system)) == (2, 2)  # each goes on after it
    assert shared_prompts(rows_of((1, 2), (3, 4))) == (0, 0)
    assert shared_prompts([]) == ()
    by_chance = [(7, *range(100, 300)), (7, *range(300, 500))]
    assert shared_prompts(rows_of(*by_chance)) == (0, 0)


def test_rows_of_a_micro_batch_share_the_prompt_though_their_number_is_given() -> None:
    rows = rows_of(*((1, 2, 3, *range(start, start + 4)) for start in range(10, 90, 10)))
    for batch in epochs(rows, 28, 0, 1, rows_per_batch=4):
        assert batch.lengths == (7,) * 4
        assert batch.n_tokens == 3 + 4 * 4


def whole(length: int, line: int) -> Row:
    return Row(tuple(range(length)), (False,) + (True,) * (length - 1), line)


def test_epochs_differ_from_each_other_and_repeat_with_the_seed() -> None:
    rows = [whole(length, line) for line, length in enumerate([3, 5, 7, 2, 9, 4, 6, 8] * 4, start=1)]

    def layout(seed: int, n_epochs: int | None, take: int | None = None) -> list[tuple[int, ...]]:
        return [batch.lengths for batch in itertools.islice(epochs(rows, 16, seed, n_epochs), take)]

    first = count_micro_batches(rows, 16, 7, 1)
    two = layout(7, 2)
    assert two == layout(7, 2) == layout(7, None, len(two))
    assert two[:first] == layout(7, 1)
    assert two[:first] != two[first:]
    assert layout(7, 1) != layout(8, 1)


def test_a_row_that_cannot_fit_is_named_before_the_first_micro_batch() -> None:
    rows = [whole(4, 1), whole(9, 12)]
    for use in (
        lambda: epochs(rows, 8, 0, None),
        lambda: pack(rows, 8, [0]),
        lambda: count_micro_batches(rows, 8, 0, 1),
    ):
        with pytest.raises(DatasetError, match="9 tokens does not fit into a micro-batch of 8") as caught:
            use()
        assert "line 12" in caught.value.where
    with pytest.raises(DatasetError, match="no rows"):
        epochs([], 8, 0, None)


# --- the examples


def test_the_example_data_sets_read_and_pack(tokenizer: PreTrainedTokenizerBase) -> None:
    train = read_rows(EXAMPLES / "handbook.jsonl", tokenizer, 64)
    held_out = read_rows(EXAMPLES / "handbook_eval.jsonl", tokenizer, 64)

    def halves(row: Row) -> tuple[str, str]:
        start = row.supervised.index(True)
        return tokenizer.decode(row.tokens[:start]), tokenizer.decode(row.tokens[start:])

    taught, asked = dict(map(halves, train)), dict(map(halves, held_out))
    assert len(taught) == len(train) >= 160  # no prompt twice
    assert not taught.keys() & asked.keys()
    assert len(held_out) == len(asked) == len(set(asked.values()))
    assert set(taught.values()) == set(asked.values())
    (batch,) = micro_batches(held_out, pack(held_out, 2048, range(len(held_out))))
    assert batch.lengths == tuple(len(row.tokens) for row in held_out)
