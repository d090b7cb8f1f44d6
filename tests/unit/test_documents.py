"""Documents that name files, functions, tests, links and exit codes name those that exist."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from hetrain.public import errors

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CODE = ("hetrain", "tasks", "worker_gpu", "cli", "benchmarks", "examples", "tests", "docker")
EXTENSIONS = {
    "acl",
    "gguf",
    "html",
    "crt",
    "env",
    "example",
    "jinja",
    "json",
    "jsonl",
    "key",
    "log",
    "md",
    "png",
    "safetensors",
    "svg",
    "toml",
    "yaml",
}
# History: it names what was there at the time.
HISTORY = {"CHANGELOG.md"}

current = [document for document in DOCUMENTS if document.name not in HISTORY]
each_document = pytest.mark.parametrize("document", current, ids=lambda path: str(path.relative_to(ROOT)))


@cache
def sources() -> tuple[Path, ...]:
    return tuple(file for top in CODE for file in (ROOT / top).rglob("*.py"))


@cache
def definitions(file: Path) -> frozenset[str]:
    text = file.read_text()
    found = re.findall(
        r"^\s*(?:async\s+)?(?:def|class)\s+(\w+)|^\s*(?:self\.)?(\w+)\s*(?::[^=\n]+)?=", text, re.MULTILINE
    )
    return frozenset(name for pair in found for name in pair if name)


def find(name: str) -> list[Path]:
    """The files that a document can mean: by their path, or by the end of it."""
    exact = [path for path in (ROOT / name, ROOT / "hetrain" / name) if path.is_file()]
    return exact[:1] or [path for path in sources() if str(path).endswith(f"/{name}")]


def prose(document: Path) -> str:
    """Its text without blocks of code."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)


@each_document
def test_files_exist_and_define_what_is_said_to_be_in_them(document: Path) -> None:
    wrong = []
    for match in re.finditer(r"`([\w/.-]+\.py)`((?:,\s+`[\w.]+`)*)", document.read_text()):
        name, names = match[1], re.findall(r"`([\w.]+)`", match[2])
        files = find(name)
        if len(files) != 1:
            wrong.append(f"{name}: {len(files)} files")
            continue
        for defined in (part for part in names if not part.endswith(".py")):
            parts = [part for part in defined.split(".") if part != files[0].stem]
            wrong += [f"{name}: {part}" for part in parts if part not in definitions(files[0])]
    assert not wrong


@each_document
def test_modules_define_what_is_said_to_be_in_them(document: Path) -> None:
    """Names such as `seal.encrypt`: a function of the module of that name."""
    others = {
        "hetrain",
        "torch",
        "nn",
        "model",
        "tasks",
        "benchmarks",
    }  # packages, and what is not a name of ours
    wrong = []
    for module, name in re.findall(r"`([a-z_]+)\.([A-Za-z_]\w*)[\w.]*`", prose(document)):
        if module in others or name in EXTENSIONS:
            continue
        files = [file for file in sources() if module in (file.stem, file.parent.name)]
        if not any(name in definitions(file) for file in files):
            wrong.append(f"{module}.{name}")
    assert not wrong


@each_document
def test_tests_exist(document: Path) -> None:
    named = set(re.findall(r"`(test_\w+)`", document.read_text()))
    tests = set().union(*(definitions(file) for file in sources() if file.name.startswith("test_")))
    assert named <= tests


def anchors(document: Path) -> set[str]:
    """As GitHub and Python-Markdown make them from headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def links(document: Path) -> Iterator[tuple[str, str]]:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            yield path, anchor


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    wrong = []
    for path, anchor in links(document):
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(f"{path}#{anchor}")
    assert not wrong


def test_the_exit_codes_are_those_of_the_errors() -> None:
    documented: dict[int, set[str]] = {}
    for code, classes in re.findall(
        r"^\| (\d+) \|([^|]*)\|", (ROOT / "docs/reference/exit-codes.md").read_text(), re.MULTILINE
    ):
        documented[int(code)] = set(re.findall(r"`(\w+)`", classes))
    raised: dict[int, set[str]] = {0: set()}
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, errors.HetrainError):
            raised.setdefault(kind.exit_code, set()).add(name)
    assert documented == raised


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
