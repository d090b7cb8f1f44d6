"""Rows of an exact length for measurements, from running English text."""

from __future__ import annotations

import json
from itertools import cycle, islice
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus.txt"
HANDBOOK = Path(__file__).parents[1] / "examples" / "handbook.jsonl"
HANDBOOK_EVAL = HANDBOOK.with_name("handbook_eval.jsonl")


def write_text_rows(path: Path, rows: int, tokens: int) -> None:
    """Writes `rows` JSONL rows of running text, each long enough to be cut to exactly `tokens` tokens."""
    words = CORPUS.read_text(encoding="utf-8").split()
    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            # A word is at least one token. The stride is prime, so that every row starts elsewhere.
            start = (row * 397) % len(words)
            text = " ".join(islice(cycle(words), start, start + tokens))
            file.write(json.dumps({"text": text}) + "\n")
