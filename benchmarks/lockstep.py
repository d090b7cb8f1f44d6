"""What it costs to wait for an update's last micro-batch: ``python -m benchmarks.lockstep --json FILE``.

``here``: ``hetrain submit`` with its embedded broker and real workers on this machine, as many micro-batches
of running text in every mode. The clock starts with training and stops with the last update; modes alternate.

``fleet``: the client's channel and four Celery workers whose GPU and network are a model
(`benchmarks.delayed`). Every micro-batch in flight is a thread that asks for products one after the other,
operands made in advance. Free threads never wait for each other; in lock step all wait at the end of a
micro-batch, here of 32 products (four decoder blocks; models have 16 to 80, so that real updates wait less
often). Figures are the throughput in lock step over that of free threads, in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.data import write_text_rows
from benchmarks.delayed import Pace
from benchmarks.environment import environment
from benchmarks.hardware import DECODERS, LLAMA_8B, WorkerModel
from benchmarks.output import add_json_option, markdown, write
from benchmarks.scaling import SHARES, Bench, bench
from benchmarks.shapes import SMOLLM2
from benchmarks.step import run_watched
from hetrain.public.allocator import keep_freed_memory
from hetrain.public.errors import HetrainError

PRODUCTS = 32
WORKERS = 4
IN_FLIGHT = (1, 2, 4, 8)
GBITS = (25.0, 1.0)


def modes(tokens: int) -> dict[str, list[str]]:
    """Options of ``hetrain submit`` by name; every mode has micro-batches of so many tokens."""
    two, one = ["--batch-tokens", str(2 * tokens)], ["--batch-tokens", str(tokens)]
    return {
        "two micro-batches an update, together (default)": two,
        "two, one after the other": [*two, "--in-flight", "1"],
        "one, the next update overlaps: --max-staleness 1": [*one, "--max-staleness", "1"],
        "one, two overlap: --max-staleness 2": [*one, "--max-staleness", "2"],
        "two, the next update overlaps: --max-staleness 1": [*two, "--max-staleness", "1"],
    }


def here(tokens: int, micro_batches: int, repeats: int) -> dict[str, Any]:
    """Seconds of every mode, run by run."""
    seconds: dict[str, list[float]] = {name: [] for name in modes(tokens)}
    for number in range(repeats):
        for name in list(seconds)[:: -1 if number % 2 else 1]:
            seconds[name].append(_train(tokens, micro_batches, modes(tokens)[name]))
            _say(f"{name}: {seconds[name][-1]:.1f} s")
    return {"model": SMOLLM2, "tokens": tokens, "micro_batches": micro_batches, "seconds": seconds}


def _train(tokens: int, micro_batches: int, mode: list[str]) -> float:
    width = int(mode[1]) // tokens
    with tempfile.TemporaryDirectory() as scratch:
        data, output = Path(scratch) / "rows.jsonl", Path(scratch) / "out"
        write_text_rows(data, rows=micro_batches, tokens=tokens)
        command = [sys.executable, "-m", "cli", "submit", str(data), "--output-dir", str(output), "--quiet"]
        command += ["--max-length", str(tokens), "--micro-batch-tokens", str(tokens), *mode]
        run_watched([*command, "--max-steps", str(micro_batches // width)])
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    if [record["tokens"] for record in records] != [tokens] * micro_batches:
        raise SystemExit("not every micro-batch was full: the figures would not compare")
    return float(records[-1]["elapsed_s"])


def fleet(gbit: float, updates: int) -> dict[str, Any]:
    """Products per second in lock step and free, by micro-batches in flight."""
    products = DECODERS[LLAMA_8B].block(2048)
    pace = Pace(WorkerModel(network_bits_per_s=1e9 * gbit), dilation=1.0, share=SHARES["transport"])
    with bench(products, seconds=1.0) as running:
        return {
            "shape": LLAMA_8B,
            "gbit": gbit,
            "workers": WORKERS,
            "products_of_a_micro_batch": PRODUCTS,
            "cells": [_cell(running, pace, in_flight, updates) for in_flight in IN_FLIGHT],
        }


def _cell(running: Bench, pace: Pace, in_flight: int, updates: int) -> dict[str, float]:
    in_step = running.in_lock_step(pace, WORKERS, in_flight, PRODUCTS, updates)
    # As long as it took, so that the ends of the window weigh as little.
    window = replace(running, seconds=updates * in_flight * PRODUCTS / in_step)
    free = float(window.run(pace, encrypts=False, workers=WORKERS, in_flight=in_flight)["products_per_s"])
    _say(f"{in_flight} in flight: {in_step:.1f} products/s in lock step, {free:.1f} free")
    return {"in_flight": in_flight, "lock_step_per_s": in_step, "free_per_s": free}


def table(figures: Mapping[str, Any]) -> str:
    """Seconds here, and the share of free throughput that lock step reaches with a fleet."""
    one = figures["here"]
    medians = {name: statistics.median(runs) for name, runs in one["seconds"].items()}
    default = next(iter(medians.values()))
    rows = [(name, f"{value:.1f}", f"{default / value:.2f} ×") for name, value in medians.items()]
    runs = len(next(iter(one["seconds"].values())))
    size = f"{one['micro_batches']} micro-batches of {one['tokens']} tokens"
    head = f"{one['model']} here, {size}, median of {runs}:"
    cells = [
        (
            f"{each['gbit']:g} Gbit/s",
            *(f"{cell['lock_step_per_s'] / cell['free_per_s']:.0%}" for cell in each["cells"]),
        )
        for each in figures["fleet"]
    ]
    many = figures["fleet"][0]
    fleet_of = f"{many['workers']} modelled workers, {many['shape']}"
    below = f"{fleet_of}, throughput in lock step over that of free threads:"
    header = ("micro-batches of an update", *(str(cell["in_flight"]) for cell in many["cells"]))
    return "\n\n".join((head, markdown(("", "seconds", "throughput"), rows), below, markdown(header, cells)))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Parses arguments, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_json_option(parser)
    parser.add_argument("--tokens", type=int, default=1024, help="of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--updates", type=int, default=4, help="of the modelled workers")
    arguments = parser.parse_args()
    keep_freed_memory()  # as `hetrain submit` does
    before = environment()
    try:
        figures = {
            "here": here(arguments.tokens, arguments.micro_batches, arguments.repeats),
            "fleet": [fleet(gbit, arguments.updates) for gbit in GBITS],
            "environment": before,
        }
    except HetrainError as error:
        raise SystemExit(str(error)) from error
    print(table(figures))
    write(figures, arguments.json)


if __name__ == "__main__":
    main()
