"""Training on this machine, asynchronously and in lock step, over the same number of micro-batches.

``hetrain submit`` with its embedded broker and real workers. In lock step, micro-batches in flight share a
snapshot and make one update, so the first to be ready wait for the last; asynchronously none waits. Runs
alternate. The clock of both starts with training and stops with the last update.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.data import write_text_rows
from benchmarks.output import markdown
from benchmarks.shapes import SMOLLM2
from benchmarks.step import run_watched

MODES: Mapping[str, bool] = {"asynchronous": False, "lock step": True}


@dataclass(frozen=True)
class Run:
    """A training run on running text."""

    model: str = SMOLLM2
    tokens: int = 512
    micro_batches: int = 6
    in_flight: int = 2
    repeats: int = 1

    def steps(self, sync: bool) -> int:
        """Updates that take so many micro-batches."""
        return self.micro_batches // self.in_flight if sync else self.micro_batches


def measure(run: Run = Run()) -> dict[str, Any]:
    """Seconds and last losses of both, run by run."""
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in MODES}
    for number in range(run.repeats):
        for name in list(MODES)[:: 1 if number % 2 else -1]:
            measured[name].append(_train(run, MODES[name]))
            print(f"{name}: {measured[name][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    return {
        "model": run.model,
        "tokens": run.tokens,
        "micro_batches": run.micro_batches,
        "in_flight": run.in_flight,
        "runs": measured,
        "seconds": {name: statistics.median(one["seconds"] for one in measured[name]) for name in measured},
    }


def _train(run: Run, sync: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        data, output = Path(scratch) / "rows.jsonl", Path(scratch) / "out"
        write_text_rows(data, rows=run.micro_batches, tokens=run.tokens)
        command = [sys.executable, "-m", "cli", "submit", str(data), "--output-dir", str(output)]
        command += ["--model-name-or-path", run.model, "--max-steps", str(run.steps(sync)), "--quiet"]
        command += ["--max-length", str(run.tokens), "--micro-batch-tokens", str(run.tokens)]
        command += ["--in-flight", str(run.in_flight), *(["--sync"] if sync else [])]
        run_watched(command)
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    if [record["tokens"] for record in records] != [run.tokens] * run.micro_batches:
        raise SystemExit("not every micro-batch was full: the figures would not compare")
    return {
        "seconds": records[-1]["elapsed_s"],
        "last_losses": statistics.mean(record["loss"] for record in records[-run.in_flight :]),
        "largest_staleness": max(record["staleness"] for record in records),
    }


def table(figures: Mapping[str, Any]) -> str:
    """Seconds of both."""
    rows = [
        (
            name,
            f"{figures['seconds'][name]:.1f}",
            f"{figures['seconds'][name] / figures['micro_batches']:.2f}",
            f"{max(run['largest_staleness'] for run in runs):.0f}",
            f"{statistics.mean(run['last_losses'] for run in runs):.4f}",
        )
        for name, runs in figures["runs"].items()
    ]
    runs = len(next(iter(figures["runs"].values())))
    head = (
        f"Training {figures['model']} here: {figures['micro_batches']} micro-batches of {figures['tokens']} "
        f"tokens, {figures['in_flight']} in flight, median of {runs}:"
    )
    header = ("", "seconds", "per micro-batch", "largest staleness", "mean of last losses")
    return f"{head}\n\n{markdown(header, rows)}"
