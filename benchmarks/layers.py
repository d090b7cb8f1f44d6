"""Adapters in all layers against the upper half alone: ``python -m benchmarks.layers --json FILE``.

Two encrypted jobs over three epochs of the handbook with the same settings: bytes on the wire by epoch, and
the held-out loss of stock peft with the adapter. In the upper half nothing is computed backward below the
lowest adapter, and forward only in the first epoch (`hetrain.nn.prefix`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from benchmarks.asynchrony import job
from benchmarks.corrections import Run, rows_of
from benchmarks.environment import environment
from benchmarks.output import add_json_option, markdown, write
from hetrain.data.packing import count_micro_batches
from hetrain.train.session import open_base

EPOCHS, TOKENS, SEED = 3, 1024, 1
JOBS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"all 30 layers": (), "--lora-layers 15-29": ("--lora-layers", "15-29")}
)


def table(jobs: Mapping[str, Any]) -> str:
    """Megabytes a token by epoch and in all, and losses."""
    rows, base = [], sum(next(iter(jobs.values()))["bytes"])
    for name, one in jobs.items():
        size = len(one["bytes"]) // EPOCHS
        parts = [slice(size * epoch, size * (epoch + 1)) for epoch in range(EPOCHS)]
        epochs = [f"{sum(one['bytes'][each]) / sum(one['tokens'][each]) / 1e6:.2f}" for each in parts]
        total = f"{sum(one['bytes']) / 1e9:.1f} GB ({sum(one['bytes']) / base:.2f} ×)"
        rows.append((name, *epochs, total, f"{one['losses'][-1]:.3f}", f"{one['held_out']:.3f}"))
    by_epoch = [f"MB a token, epoch {epoch + 1}" for epoch in range(EPOCHS)]
    return markdown(("adapters", *by_epoch, "in all", "last loss", "held-out loss"), rows)


def main() -> None:
    """Parses arguments, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_json_option(parser)
    arguments = parser.parse_args()
    base, before = open_base("smollm2-135m"), environment()
    updates = count_micro_batches(rows_of(base, "handbook")[0], TOKENS, SEED, EPOCHS)
    run = Run("handbook", updates, TOKENS, SEED)
    jobs = {name: job(base, run, options) for name, options in JOBS.items()}
    print(table(jobs))
    write({"jobs": jobs, "environment": before}, arguments.json)


if __name__ == "__main__":
    main()
