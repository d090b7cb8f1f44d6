"""What all measurements share: the option --json, rounds over contestants, tables."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--json FILE``, refused at once when its directory is not there."""
    parser.add_argument("--json", type=_file, help="write the figures to this file")


def _file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {path.parent}")
    return path


def write(figures: Mapping[str, Any], path: Path | None) -> None:
    """Writes the figures, with the options that made them, where ``--json`` says, if it does."""
    if path is not None:
        whole = {**figures, "options": _options(sys.argv[1:])}
        path.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _options(arguments: Sequence[str]) -> list[str]:
    """All but ``--json FILE``, which says nothing of the figures."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json")
    return parser.parse_known_args(arguments)[1]


def rounds(contestants: Mapping[K, Callable[[], T]], repeats: int) -> dict[K, list[T]]:
    """What every contestant gave in each of `repeats` rounds, after one round that does not count.

    All run once per round, and each round begins with another one: whatever else the machine does hits all
    alike.
    """
    names = list(contestants)
    given: dict[K, list[T]] = {name: [] for name in names}
    for contestant in contestants.values():
        contestant()
    for number in range(repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            given[name].append(contestants[name]())
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
