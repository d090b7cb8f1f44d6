"""Asks an adapter and its base model every question of the evaluation rows: a table, and how many are right.

python examples/handbook_table.py ADAPTER_DIRECTORY [ROWS.jsonl] [--at-least N]
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import hetrain

EVALUATION = Path(__file__).parent / "handbook_eval.jsonl"
TOKENS = 32


def first_line(text: str) -> str:
    """What the table shows of an answer."""
    return text.strip().partition("\n")[0]


def main() -> None:
    """Prints the table; exits with 1 if fewer than `--at-least` answers are exactly right."""
    parser = argparse.ArgumentParser()
    parser.add_argument("adapter", type=Path)
    parser.add_argument("rows", type=Path, nargs="?", default=EVALUATION)
    parser.add_argument("--at-least", type=int, default=0)
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.rows.read_text(encoding="utf-8").splitlines() if line.strip()]
    prompts = [row["prompt"] for row in rows]
    expected = [row["completion"].strip() for row in rows]
    before = hetrain.ask(given.adapter, prompts, prompt_template="{}", max_new_tokens=TOKENS, base_only=True)
    after = hetrain.ask(given.adapter, prompts, prompt_template="{}", max_new_tokens=TOKENS)

    table = Table("question", "expected", "before", "after", "right", show_lines=True)
    for prompt, wanted, old, new in zip(prompts, expected, before, after, strict=True):
        question = prompt.removeprefix("Question:").removesuffix("Answer:").strip()
        cells = (question, wanted, first_line(old), first_line(new), "yes" if new == wanted else "no")
        table.add_row(*map(escape, cells))
    Console().print(table)
    right, was_right = (sum(map(str.__eq__, answers, expected)) for answers in (after, before))
    print(f"exactly right: {right} of {len(rows)}; before training: {was_right}")
    if right < given.at_least:
        sys.exit(f"fewer than {given.at_least}")


if __name__ == "__main__":
    main()
