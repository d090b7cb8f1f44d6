"""Data sets as users have them: every format, several of them, and what is wrong with them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetrain.config import DataConfig
from hetrain.data.dataset import RawRow, divide, read_raw_rows
from hetrain.data.hub import read_hub
from hetrain.data.json_rows import read_json_array
from hetrain.data.records import Record
from hetrain.data.schema import Conversation, InstructionForm, Message, StringPair, TextForm, check_record
from hetrain.data.sources import HubSplit
from hetrain.public.errors import DatasetError, UsageError

ROWS = [
    {"prompt": "What sings?", "completion": ' Herrings, at dusk;\nthey "sing".'},
    {"prompt": "Wo?\u2028", "completion": "\tIn der Nähe, 漢字."},
    {"prompt": "x", "completion": "y" * 1_300_000},  # longer than what is read at once
    {"prompt": "last", "completion": "one"},
]


def read(*names: object, **options: Any) -> list[RawRow]:
    return read_raw_rows([str(name) for name in names], DataConfig(**options), HubSplit())


def contents(rows: list[RawRow]) -> list[dict[str, Any]]:
    return [row.content.model_dump() for row in rows]


def as_csv(delimiter: str, ending: str = "\n") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "completion"], delimiter=delimiter, lineterminator=ending)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


JSON_LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
FORMATS: dict[str, bytes] = {
    "lines.jsonl": JSON_LINES,
    "lines.json": JSON_LINES,
    "array.json": json.dumps(ROWS).encode(),
    "pretty.json": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).encode(),
    "array.jsonl": json.dumps(ROWS, ensure_ascii=False).encode() + b"\n",
    "commas.csv": as_csv(","),
    "windows.csv": b"\xef\xbb\xbf" + as_csv(";", "\r\n"),
    "tabs.tsv": as_csv("\t"),
    "no_suffix": as_csv(","),
    "rows.parquet": as_parquet(ROWS),
    "parquet_called.jsonl": as_parquet(ROWS),
}
FORMATS |= {
    f"{name}.gz": gzip.compress(content, mtime=0)
    for name, content in FORMATS.items()
    if b"PAR1" not in content[:4]
}
FORMATS["gzip_called.jsonl"] = gzip.compress(JSON_LINES, mtime=0)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_the_same_rows(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FORMATS[name])
    rows = read(tmp_path / name)
    assert contents(rows) == ROWS
    assert {row.source for row in rows} == {str(tmp_path / name)}


def test_folders_several_files_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("b.parquet", "a.csv", "README.md"):
        (folder / name).write_bytes(
            FORMATS.get({"b.parquet": "rows.parquet", "a.csv": "commas.csv"}.get(name, ""), b"#")
        )
    (folder / ".hidden.jsonl").write_bytes(b"no rows")
    more = tmp_path / "more.json.gz"
    more.write_bytes(FORMATS["array.json.gz"])
    for piped in (FORMATS["rows.parquet"], FORMATS["commas.csv.gz"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped)))
        rows = read(folder, more, "-")
        assert contents(rows) == ROWS * 4
        sources = dict.fromkeys(row.source for row in rows)
        assert list(sources) == [
            str(folder / "a.csv"),
            str(folder / "b.parquet"),
            str(more),
            "standard input",
        ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"no file of rows.*\.parquet"):
        read(tmp_path / "empty")


def test_a_pipe_is_read(tmp_path: Path) -> None:
    for name in ("rows.parquet", "lines.jsonl.gz"):
        content = (
            as_parquet(ROWS[-1:]) if name == "rows.parquet" else gzip.compress(json.dumps(ROWS[-1]).encode())
        )
        end, begin = os.pipe()
        os.write(begin, content)
        os.close(begin)
        assert contents(read(f"/dev/fd/{end}")) == ROWS[-1:]
        os.close(end)


def test_files_may_differ_in_form_but_not_within(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "b.csv").write_text("instruction,input,output\nx,,y\n")
    assert len(read(tmp_path)) == 2
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\n{"messages": [{"role": "user", "content": "x"}]}\n')
    with pytest.raises(DatasetError, match="one form per file") as caught:
        read(tmp_path)
    assert caught.value.where == f"{tmp_path / 'c.jsonl'}:2"


# --- what is not rows


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"PK\x03\x04rest", "Excel"),
        (b"\x28\xb5\x2f\xfdrest", "zstd"),
        (b"\x80\x04\x95rest", "pickle"),
        ("{}".encode("utf-16"), "UTF-16"),
        (b"ARROW1\x00\x00", "Arrow"),
        (gzip.compress(b"\x80\x04\x95rest", mtime=0), "pickle"),
        (gzip.compress(FORMATS["rows.parquet"], mtime=0), "Decompress it once"),
        (FORMATS["lines.jsonl.gz"][:-20], "gzip file is damaged"),
        (FORMATS["rows.parquet"][:-9], "Parquet file cannot be read"),
        (b"prompt,prompt\nx,y\n", "two columns are called 'prompt'"),
        (b"", "is empty"),
        (b"prompt,completion\n", "is empty"),
        (b"[]", "is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_file_of_rows_is_called_by_its_name(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=says) as caught:
        read(path)
    assert caught.value.where.startswith(str(path))
    assert caught.value.hint
    assert "UTF-8" not in str(caught.value) or says == "UTF-16"


@pytest.mark.parametrize("word", ["ORCID", "BZhours", "ARROW1", "PAR1", "SQLite format 3"])
def test_a_header_may_begin_as_a_binary_file_does(word: str, tmp_path: Path) -> None:
    content = f"{word},text\n0000-0002,x\n".encode()
    (tmp_path / "rows.csv").write_bytes(content)
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(content, mtime=0))
    assert contents(read(tmp_path)) == [{"text": "x"}] * 2
    (tmp_path / "orc.csv").write_bytes(b"ORC\x0a\x03\x00\x00\x00")
    with pytest.raises(DatasetError, match="this is an ORC file"):
        read(tmp_path / "orc.csv")
    (tmp_path / "parquet.csv").write_bytes(as_parquet([{"text": "x"}]))
    assert contents(read(tmp_path / "parquet.csv")) == [{"text": "x"}]


def test_without_pyarrow_parquet_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.parquet").write_bytes(FORMATS["rows.parquet"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DatasetError, match=r"pip install \"hetrain\[data\]\""):
        read(tmp_path / "x.parquet")


# --- rows that cannot be used


def bad_json(place: int) -> str:
    return '{"text": ""}' if place % 3 else '{"text": "the safe\'s code", "text": "x"}'


@pytest.mark.parametrize("pretty", [False, True])
def test_the_first_ten_bad_rows_are_named_at_once(pretty: bool, tmp_path: Path) -> None:
    lines = [bad_json(place) if 2 <= place < 14 else '{"text": "x"}' for place in range(20)]
    path = tmp_path / "rows.json"
    path.write_text("[" + ",\n".join(lines) + "]" if pretty else "\n".join(lines))
    with pytest.raises(DatasetError) as caught:
        read(path)
    said = str(caught.value).splitlines()
    assert said[0] == "12 rows cannot be used:"
    assert [line.strip().partition(": ")[0] for line in said[1:11]] == [f"{path}:{n}" for n in range(3, 13)]
    assert "'text' is empty" in said[1]
    assert "the key 'text' stands there twice" in said[2]
    assert said[11].strip().startswith("and 2 more. ")
    assert "safe" not in f"{caught.value} {caught.value.__cause__}"


def test_lines_of_csv_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"two\nlines",x\n\nx\ny,"z"\ny,\n"x" y,z\nx,y\n')
    with pytest.raises(DatasetError) as caught:
        read(path)
    said = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert said[0] == f"{path}:5: this row has 1 cells, the header 2"
    assert said[1] == f"{path}:7: field 'completion' is empty"
    assert said[2].startswith(f"{path}:8: this is not CSV")
    path.write_bytes(b"text\nfine\ncaf\xe9\n")
    with pytest.raises(DatasetError, match="byte 4 of this line is not UTF-8") as caught:
        read(path)
    assert caught.value.where == f"{path}:3"


@pytest.mark.parametrize(
    "rest", ['{"text": "y"', '{"text": "y"} {"text": "z"}]', '{"text": "y"}] 1', "]", '{"text": \x00"y"}]']
)
def test_an_array_that_breaks_off_is_named_by_its_line(rest: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[\n{"text": "x"},\n\n' + rest)
    with pytest.raises(DatasetError, match="no JSON array") as caught:
        read(path)
    assert caught.value.where == f"{path}:4"


class _Slowly(io.BytesIO):
    """Gives a few bytes at a time, however many are asked for."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(3, size) if size and size > 0 else 3)


@given(
    st.lists(st.dictionaries(st.text(), st.text() | st.integers(), max_size=4), max_size=6),
    st.integers(0, 4),
)
def test_an_array_is_the_same_in_pieces(rows: list[dict[str, Any]], indent: int) -> None:
    text = json.dumps(rows, indent=indent or None, ensure_ascii=indent % 2 == 0)
    text = text.encode("utf-8", "surrogatepass").decode("utf-8", "ignore")
    items = list(read_json_array(_Slowly(text.encode()), "x"))
    assert [item.columns for item in items if isinstance(item, Record)] == json.loads(text)
    assert len(items) == len(rows)


# --- columns


def test_columns_that_are_not_used_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    turn = {"role": "user", "content": "x", "name": "ann", "weight": 3}
    lines = [{"messages": [turn], "id": 4}, {"messages": [turn], "id": 5, "text": "y"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    with caplog.at_level(logging.WARNING, logger="hetrain"):
        rows = read(path)
    assert rows[0].content == Conversation(messages=[Message(role="user", content="x", name="ann")])
    (record,) = caplog.records
    for said in ("'id' (2 rows)", "'text' (1 rows)", "'messages[].weight' (2 rows)"):
        assert said in record.getMessage()
    with pytest.raises(
        DatasetError, match=r"2 rows(.|\n)*'id', 'messages\[\]\.weight', 'text' does not belong here"
    ):
        read(path, strict=True)


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,Question,Answer\nx,What?,That.\n")
    (row,) = read(path, prompt_field="Question", completion_field="Answer")
    assert row.content == StringPair(prompt="What?", completion="That.")
    (row,) = read(path, text_field="Answer")
    assert row.content == TextForm(text="That.")
    with pytest.raises(DatasetError, match="none of the known columns, it has 'text', 'Question', 'Answer'"):
        read(path, text_field="body")
    path.write_text("text,Question,Answer\nx,What?,\n")
    with pytest.raises(DatasetError, match="field 'Answer' is empty"):
        read(path, prompt_field="Question", completion_field="Answer")
    with pytest.raises(UsageError) as caught:
        DataConfig(text_field="a", prompt_field="b")
    assert caught.value.field == "text_field"


def test_messages_in_parquet_and_in_csv(tmp_path: Path) -> None:
    """Fields that a message lacks are null there, since others have them."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "Rome"}}}
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        {"role": "assistant", "content": "Rain."},
    ]
    (tmp_path / "x.parquet").write_bytes(as_parquet([{"messages": turns, "text": None}]))
    (row,) = read(tmp_path / "x.parquet", strict=True)
    assert isinstance(row.content, Conversation)
    assert [turn.as_template_sees_it() for turn in row.content.messages] == turns
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(turns)]])
    assert read(tmp_path / "x.csv")[0].content == row.content


def test_roles_of_sharegpt_are_known_in_every_spelling(tmp_path: Path) -> None:
    said = ["System", "Human", "GPT", " USER", "chatgpt", "tool", "Bard"]
    (tmp_path / "x.json").write_text(
        json.dumps([{"conversations": [{"from": each, "value": "x"} for each in said]}])
    )
    (row,) = read(tmp_path / "x.json")
    assert isinstance(row.content, Conversation)
    roles = ["system", "user", "assistant", "user", "assistant", "tool", "assistant"]
    assert [turn.role for turn in row.content.messages] == roles


def test_what_need_not_be_there_may_be_null_or_an_empty_cell(tmp_path: Path) -> None:
    asks, tool = [{"role": "user", "content": "Weather?"}], [{"type": "function"}]
    path = tmp_path / "x.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["messages", "tools", "chat_template_kwargs"])
        rows.writerows([[json.dumps(asks), "", ""], [json.dumps(asks), json.dumps(tool), "null"]])
    messages = [Message(role="user", content="Weather?")]
    expected = [Conversation(messages=messages), Conversation(messages=messages, tools=tool)]
    assert [row.content for row in read(path, strict=True)] == expected
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": asks, "tools": None, "chat_template_kwargs": None}))
    assert [row.content for row in read(path, strict=True)] == expected[:1]
    path.write_text(json.dumps({"instruction": "x", "input": None, "output": "y"}))
    assert [row.content for row in read(path)] == [InstructionForm(instruction="x", output="y")]


def test_tools_in_parquet_and_on_the_hub_are_those_of_json(tmp_path: Path) -> None:
    """Arguments that a call lacks are null there, since another call has them."""

    def call(name: str, **arguments: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, "arguments": arguments}}

    def tool(name: str, **properties: Any) -> dict[str, Any]:
        parameters = {"type": "object", "properties": properties}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    asks = {"role": "user", "content": "Weather?"}
    first = call("weather", place={"city": "Rome"})
    second = call("news", days=3, topics=[{"name": "sport"}, {"like": "herrings"}])
    tools = [tool("weather", place={"type": "object"}), tool("news", days={"type": "integer"})]
    conversations = [
        {"messages": [asks, {"role": "assistant", "content": None, "tool_calls": [each]}], "tools": tools}
        for each in (first, second)
    ]
    conversations[0]["chat_template_kwargs"] = {"thinking": True}
    conversations[1]["chat_template_kwargs"] = {"date": "today"}
    pairs = [
        {"prompt": row["messages"][:1], "completion": row["messages"][1:], "tools": row["tools"]}
        for row in conversations
    ]
    for name, rows in (("messages", conversations), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.parquet").write_bytes(as_parquet(rows))
        same = contents(read(tmp_path / f"{name}.jsonl"))
        assert "null" not in json.dumps(same[0]["tools"])
        assert contents(read(tmp_path / name, strict=True)) == same
        on_hub = read_hub(str(tmp_path / name), None, "train")
        checked = [check_record(item, DataConfig()) for item in on_hub if isinstance(item, Record)]
        assert [each.content.model_dump() for each in checked] == same


@pytest.mark.parametrize(
    ("line", "options", "field"),
    [
        ({"text": "x"}, {"assistant_only_loss": True}, "assistant_only_loss"),
        ({"prompt": "x", "completion": "y"}, {"assistant_only_loss": True}, "assistant_only_loss"),
        ({"text": "x"}, {"completion_only_loss": True}, "completion_only_loss"),
        (
            {"messages": [{"role": "user", "content": "x"}]},
            {"completion_only_loss": True},
            "completion_only_loss",
        ),
    ],
)
def test_a_loss_that_the_form_does_not_have_is_refused(
    line: dict[str, Any], options: dict[str, Any], field: str, tmp_path: Path
) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(line))
    with pytest.raises(UsageError) as caught:
        read(tmp_path / "x.jsonl", **options)
    assert caught.value.field == field


# --- rows that are held out


@given(st.integers(2, 300), st.floats(0.001, 0.99), st.integers())
def test_rows_are_held_out_by_seed(count: int, share: float, seed: int) -> None:
    rows = [RawRow(TextForm(text="x"), "x", line) for line in range(count)]
    if max(1, round(share * count)) >= count:
        with pytest.raises(UsageError, match="nothing to learn"):
            divide(rows, share, seed)
        return
    found = divide(rows, share, seed)
    assert len(found.held_out) == max(1, round(share * count))
    assert sorted([*found.learned, *found.held_out], key=lambda row: row.line) == rows
    assert found == divide(rows, share, seed)
    assert divide(rows, 0, seed).learned == tuple(rows)


# --- the hub


def in_hub(folder: Path, content: Callable[[Path], object]) -> Path:
    folder.mkdir()
    content(folder)
    return folder


def test_a_data_set_of_the_hub_has_the_same_rows(tmp_path: Path) -> None:
    """A folder stands for it: `datasets` opens both in the same way."""
    folder = in_hub(tmp_path / "hub", lambda to: (to / "train.parquet").write_bytes(FORMATS["rows.parquet"]))
    items = list(read_hub(str(folder), None, "train"))
    assert [item.columns for item in items if isinstance(item, Record)] == ROWS
    with pytest.raises(DatasetError, match="split"):
        list(read_hub(str(folder), None, "validation"))


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (Path(os.environ["HETRAIN_TEST_MARK"]), "ran")


def test_a_data_set_of_the_hub_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    monkeypatch.setenv("HETRAIN_TEST_MARK", str(mark))
    script = f"from pathlib import Path\nPath({str(mark)!r}).write_text('ran')\n"
    scripted = in_hub(tmp_path / "scripted", lambda to: (to / "scripted.py").write_text(script))
    pickled = in_hub(tmp_path / "pickled", lambda to: (to / "train.pkl").write_bytes(pickle.dumps(_Bomb())))
    metadata = "---\nconfigs:\n- config_name: default\n  data_files: train.pkl\n---\n"
    (pickled / "README.md").write_text(metadata)
    text = in_hub(tmp_path / "text", lambda to: (to / "train.txt").write_text("a line"))
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"text": "private"}')
    elsewhere = in_hub(tmp_path / "elsewhere", lambda to: (to / "train.jsonl").write_text('{"text": "x"}'))
    (elsewhere / "README.md").write_text(metadata.replace("train.pkl", str(mine)))
    for folder in (scripted, pickled, text, elsewhere):
        with pytest.raises(DatasetError) as caught:
            list(read_hub(str(folder), None, "train"))
        assert caught.value.hint
    assert not mark.exists()


def test_without_datasets_a_name_of_the_hub_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError, match=r"no such file.*pip install \"hetrain\[data\]\""):
        read("owner/name")
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    for missing in ("other/rows.jsonl", "data/rows"):
        with pytest.raises(DatasetError, match="cannot be read: No such file"):
            read(missing)
