"""Do encrypted jobs learn as stock peft does? ``python -m benchmarks.asynchrony --json FILE``, resumable.

For each number of updates and each seed, over the handbook with a cosine schedule and a tenth of the updates
as warm-up: stock peft in fp32 in this process, ``hetrain submit`` with its defaults, and with
``--max-staleness 2`` and three micro-batches in flight. All have the same initial adapter, micro-batches and
schedule. The held-out loss is that of stock peft with the adapter, over ``handbook_eval.jsonl``. To tell what
is chance, stock peft also starts from the adapter changed by a thousandth; to tell what rounding of the
linears' weights does, it also trains on the int8 ones that workers have, and on bfloat16 ones, and is
measured on the weights as they are, as all are.

A run that the file has is not repeated, so a stopped measurement goes on. `benchmarks.corrections` compares
ways to correct staleness, `benchmarks.lockstep` throughput.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.corrections import (
    RATES,
    Rounding,
    Run,
    held_out_loss,
    round_to_bfloat16,
    round_to_int8,
    set_up,
    train,
)
from benchmarks.data import HANDBOOK
from benchmarks.output import add_json_option, complete_runs, markdown
from benchmarks.step import run_watched
from hetrain.train.session import BaseModelFiles, open_base

PEFT = "stock PEFT, fp32"
PEFT_AGAIN = "stock PEFT, fp32, initial adapter changed by 0.1 %"
ROUNDED: Mapping[str, Rounding] = MappingProxyType(
    {
        "stock PEFT, fp32, on bfloat16 weights": round_to_bfloat16,
        "stock PEFT, fp32, on int8 weights": round_to_int8,
    }
)
CHANGE = 1e-3
"""Relative size of that change: what it does to the held-out loss is chance."""
JOBS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "default: lock step": (),
        "--max-staleness 2": ("--max-staleness", "2", "--in-flight", "3"),
    }
)
MODES = (PEFT, PEFT_AGAIN, *ROUNDED, *JOBS)


def figures_of(base: BaseModelFiles, run: Run, how: str) -> dict[str, Any]:
    """Losses of a training."""
    if how in JOBS:
        return job(base, run, JOBS[how])
    return train(base, run, change=CHANGE if how == PEFT_AGAIN else 0.0, rounding=ROUNDED.get(how))


def job(base: BaseModelFiles, run: Run, options: tuple[str, ...]) -> dict[str, Any]:
    """A job over the real queue, encrypted."""
    settings = (
        f"--max-steps {run.updates} --batch-tokens {run.tokens} --seed {run.seed} "
        f"--learning-rate {RATES[run.data]} --lr-scheduler-type cosine --warmup-steps {run.warm_up} --quiet"
    ).split()
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "out"
        command = [sys.executable, "-m", "cli", "submit", str(HANDBOOK), "--output-dir", str(output)]
        run_watched([*command, *settings, *options])
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        stock = AutoModelForCausalLM.from_pretrained(base.files.directory, dtype=torch.float32)
        model = PeftModel.from_pretrained(stock, output, is_trainable=True)
        held_out = held_out_loss(model, set_up(base, run, 2048).held_out)
    records = [json.loads(line) for line in lines]
    return {
        "held_out": held_out,
        "losses": [record["loss"] for record in records],
        "tokens": [record["tokens"] for record in records],
        "bytes": [record["bytes_up"] + record["bytes_down"] for record in records],
        "mean_staleness": statistics.mean(record["staleness"] for record in records),
        "seconds": records[-1]["elapsed_s"],
    }


def table(runs: Mapping[str, Any]) -> str:
    """Held-out losses by seed, and the mean of each way against that of stock peft for the same seeds."""
    groups: dict[str, dict[str, dict[str, float]]] = {}
    for name, run in runs.items():
        what, _, how = name.partition(": ")
        size, _, seed = what.partition(", seed ")
        groups.setdefault(size, {}).setdefault(how, {})[seed] = run["held_out"]
    rows = []
    for size, hows in groups.items():
        for how in [mode for mode in MODES if mode in hows]:
            losses = hows[how]
            mean = statistics.mean(losses.values())
            plain = [hows[PEFT][seed] for seed in losses if seed in hows.get(PEFT, {})]
            against = f"{mean / statistics.mean(plain) - 1:+.1%}" if len(plain) == len(losses) else ""
            by_seed = ", ".join(f"{loss:.3f}" for _, loss in sorted(losses.items()))
            rows.append((size, how, by_seed, f"{mean:.3f}", against))
    header = ("handbook", "", "held-out loss of each seed", "mean", "against stock PEFT, same seeds")
    return markdown(header, rows)


def main() -> None:
    """Parses arguments, makes the runs that are missing, writes after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_json_option(parser)
    parser.add_argument("--updates", nargs="+", type=int, default=[20, 100])
    parser.add_argument("--tokens", type=int, default=1024, help="of an update")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    arguments = parser.parse_args()
    base = open_base("smollm2-135m")
    trainings = {
        f"{updates} updates of {arguments.tokens} tokens, seed {seed}: {how}": partial(
            figures_of, base, Run("handbook", updates, arguments.tokens, seed), how
        )
        for seed in arguments.seeds
        for updates in arguments.updates
        for how in arguments.modes
    }
    print(table(complete_runs(trainings, arguments.json)))


if __name__ == "__main__":
    main()
