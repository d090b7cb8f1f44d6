"""Commands in documents: all of them are understood, and those of README, tutorial and others run."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.main import add_commands
from tests.harness.processes import HANDBOOK, hetrain

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^```\w*\n(.*?)^```|((?:^ {4}[^\n]*\n)+)", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"\s#\s.*$")
_RUNS_HETRAIN = re.compile(r"(?:^|[|;&])\s*(?:[A-Z_]+=\S*\s+)*hetrain\s")
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*$")
_SEPARATORS = {";", "&&", "||", "|", "&", ">"}


def commands(document: Path) -> list[list[str]]:
    """The words of every `hetrain` command in the document's blocks of code, without its variables."""
    found = []
    for block in _BLOCK.finditer(document.read_text()):
        lines = (block[1] or block[2]).replace("\\\n", " ").splitlines()
        found += [words for line in lines for words in _commands_of(line)]
    return found


def _commands_of(line: str) -> Iterator[list[str]]:
    if not _RUNS_HETRAIN.search(line):
        return
    words: list[str] = []
    lexer = shlex.shlex(_COMMENT.sub("", line), posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    for word in [*lexer, ";"]:
        if word not in _SEPARATORS:
            words.append(word)
            continue
        while words and _ASSIGNMENT.match(words[0]):
            words.pop(0)
        if words[:1] == ["hetrain"]:
            yield words[1:]
        words = []


DOCUMENTS = [path for path in sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]) if commands(path)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_is_understood(document: Path) -> None:
    for words in commands(document):
        name, *rest = [word for word in words if word != "--debug"]
        add_commands()[name].make_context(name, rest)


def test_commands_are_found_as_a_shell_reads_them() -> None:
    line = "    A=1 hetrain plan x; y | hetrain ask a 'b ; c' --json && hetrain wait j  # hetrain list"
    assert list(_commands_of(line)) == [["plan", "x"], ["ask", "a", "b ; c", "--json"], ["wait", "j"]]


@pytest.fixture
def place(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with rows to learn and rows that are held out."""
    rows = HANDBOOK.read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:24]))
    (tmp_path / "held_out.jsonl").write_text("".join(rows[24:30]))
    monkeypatch.setenv("HETRAIN_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["README.md", "docs/tutorial.md", "docs/after-training.md"])
def test_they_run_in_order(name: str, place: Path, tiny_llama: Path) -> None:
    if name == "docs/after-training.md":
        begin = "submit", "rows.jsonl", "-o", "out", "-m", tiny_llama, "--max-steps", 1
        assert hetrain(*begin).returncode == 0
    # A worker serves until it is stopped; "-" is standard input.
    found = [words for words in commands(ROOT / name) if words[0] != "worker" and "-" not in words]
    assert len(found) >= 3
    for words in found:
        done = hetrain(*_of_tiny_model(words, str(tiny_llama)))
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"


def _of_tiny_model(words: list[str], model: str) -> list[str]:
    named = [model if word == "smollm2-135m" else word for word in words]
    return [*named, "-m", model] if words[0] in ("submit", "eval") and "--adapter" not in words else named
