"""Shared by all measurements: the option --json, rounds over cases, resumable runs, tables."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.environment import environment

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--json FILE``, refused at once when its directory does not exist."""
    parser.add_argument("--json", type=_file, help="write the figures to this file")


def _file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {path.parent}")
    return path


def write(figures: Mapping[str, Any], path: Path | None) -> None:
    """Writes the figures, with the options that made them, to the file of ``--json``, if it is given."""
    if path is not None:
        whole = {**figures, "options": _options(sys.argv[1:])}
        path.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def complete_runs(trainings: Mapping[str, Callable[[], dict[str, Any]]], path: Path | None) -> dict[str, Any]:
    """Figures by name: those that the file at `path` has, then those of the trainings that it lacks.

    The file is written anew after each.
    """
    runs: dict[str, Any] = {}
    if path is not None and path.exists():
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    before = environment()
    for name, training in trainings.items():
        if name not in runs:
            runs[name] = training()
            print(f"{name}: {runs[name]['held_out']:.4f}", file=sys.stderr, flush=True)
            write({"runs": runs, "environment": before}, path)
    return runs


def _options(arguments: Sequence[str]) -> list[str]:
    """All but ``--json FILE``, which does not affect the figures."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json")
    return parser.parse_known_args(arguments)[1]


def rounds(cases: Mapping[K, Callable[[], T]], repeats: int) -> dict[K, list[T]]:
    """The results of every case in each of `repeats` rounds, after one round that does not count.

    All run once per round, and each round begins with another one, so that other load on the machine affects
    all alike.
    """
    names = list(cases)
    given: dict[K, list[T]] = {name: [] for name in names}
    for case in cases.values():
        case()
    for number in range(repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            given[name].append(cases[name]())
    return given


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """`work`, giving the seconds that it takes."""

    def run() -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    return run


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
