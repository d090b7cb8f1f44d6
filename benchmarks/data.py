"""Rows of an exact length for measurements, from the text of the example data set."""

from __future__ import annotations

import json
from itertools import chain, cycle, islice
from pathlib import Path

HANDBOOK = Path(__file__).parents[1] / "examples" / "handbook.jsonl"


def write_text_rows(path: Path, rows: int, tokens: int) -> None:
    """Writes `rows` JSONL rows of running text, each long enough to be cut to exactly `tokens` tokens."""
    passages = [
        f"{row['prompt']}{row['completion']}\n\n"
        for row in map(json.loads, HANDBOOK.read_text().splitlines())
    ]
    words = list(chain.from_iterable(passage.split(" ") for passage in passages))
    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            # A word is at least one token; a prime stride makes every row start elsewhere.
            text = " ".join(islice(cycle(words), (row * 397) % len(words), (row * 397) % len(words) + tokens))
            file.write(json.dumps({"text": text}) + "\n")
