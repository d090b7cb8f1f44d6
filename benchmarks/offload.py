"""How much processor time outsourcing takes off the client: ``python -m benchmarks.offload --json FILE``.

Client: `hetrain.finetune` with default settings over running text, in a process of its own. Its broker and
worker are other processes, whose time is not counted, though they share its cores. Plain: the same updates
with stock peft, in fp32 and in bfloat16, on all cores. Both are measured between the ends of the first and of
the last update: processor time, user and system, and page faults are those of the process (getrusage); memory
is its largest resident set from its start on. The offload ratio is the processor time of stock peft in fp32
over that of the client, for the same tokens. What the whole of Llama-3.1-8B takes follows from slices of 2
and 4 of its 32 layers, as all layers take the same.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.data import write_text_rows
from benchmarks.environment import environment
from benchmarks.output import add_json_option, markdown, write
from benchmarks.shapes import LLAMA_8B_LAYERS, LLAMA_8B_SLICES, MODELS, SMOLLM2
from benchmarks.step import ROW_TOKENS, run_watched
from hetrain.public.allocator import keep_freed_memory, tuned_environment

PLAIN = ("float32", "bfloat16")


@dataclass(frozen=True)
class Usage:
    """Of this process until now: seconds, and page faults that needed no disk."""

    wall_s: float
    user_s: float
    system_s: float
    faults: int

    @staticmethod
    def now() -> Usage:
        """Reads it."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return Usage(time.perf_counter(), used.ru_utime, used.ru_stime, used.ru_minflt)


def report(readings: Sequence[Usage], tokens: int, **more: float) -> None:
    """Prints means over the updates between the first reading and the last, and the largest resident set."""
    first, last, updates = asdict(readings[0]), asdict(readings[-1]), len(readings) - 1
    means = {name: (last[name] - first[name]) / updates for name in first}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    print(json.dumps({**means, "tokens": tokens, "peak_rss_bytes": peak, **more}))


def client(model: str, updates: int, tokens: int | None, outsource: Sequence[str]) -> None:
    """Trains and reports on this process."""
    import hetrain

    keep_freed_memory()  # as the command line does, which also starts in `tuned_environment`
    readings: list[Usage] = []
    wire = 0

    def on_step(metrics: Any) -> None:
        nonlocal wire
        wire += metrics.bytes_up + metrics.bytes_down
        if metrics.step > len(readings):
            readings.append(Usage.now())

    config = hetrain.TrainingConfig(max_steps=updates + 1, max_length=ROW_TOKENS, batch_tokens=tokens)
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.jsonl"
        write_text_rows(data, rows=config.tokens_per_update // ROW_TOKENS, tokens=ROW_TOKENS)
        result = hetrain.finetune(
            data,
            model=model,
            output_dir=Path(scratch) / "out",
            training=config,
            outsourcing=hetrain.OutsourcingConfig(outsource=tuple(outsource)),
            on_step=on_step,
        )
    report(readings, result.tokens // (updates + 1), wire_bytes=wire / (updates + 1))


def plain(model: str, updates: int, tokens: int | None, dtype: str) -> None:
    """Trains with stock peft and reports on this process."""
    import torch

    from benchmarks.plain import plain_model, plain_step
    from hetrain.config import LoraConfig, TrainingConfig
    from hetrain.data.packing import epochs
    from hetrain.data.tokenization import read_rows
    from hetrain.nn.lora import adapter_parameters
    from hetrain.train.session import open_base

    config, base = TrainingConfig(batch_tokens=tokens), open_base(model)
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.jsonl"
        write_text_rows(data, rows=config.tokens_per_update // ROW_TOKENS, tokens=ROW_TOKENS)
        rows = read_rows(data, base.tokenizer, ROW_TOKENS)
    batches = list(epochs(rows, config.tokens_per_micro_batch, 0, 1))
    adapted = plain_model(base.files.directory, LoraConfig(), dtype=getattr(torch, dtype))
    parameters = adapter_parameters(adapted)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4)
    readings = []
    for _ in range(updates + 1):
        for batch in batches:
            for name, gradient in plain_step(adapted, batch)[1].items():
                parameter = parameters[name]
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        optimizer.step()
        optimizer.zero_grad()
        readings.append(Usage.now())
    report(readings, sum(batch.n_tokens for batch in batches))


def measure(
    shape: str, updates: int, tokens: int | None, outsource: Sequence[str], kinds: Sequence[str]
) -> dict[str, Any]:
    """The client and the plain trainings of a shape, one after the other."""
    model = MODELS[shape]()
    patterns = [word for pattern in outsource for word in ("--outsource", pattern)]
    run_watched([sys.executable, "-m", "cli", "prepare", model, "--quiet", *patterns])
    calls: dict[str, Callable[[], str]] = {
        "client": lambda: f"client({model!r}, {updates}, {tokens}, {outsource!r})"
    }
    calls |= {kind: lambda kind=kind: f"plain({model!r}, {updates}, {tokens}, {kind!r})" for kind in kinds}  # type: ignore[misc]
    return {
        "shape": shape,
        "updates": updates,
        "outsource": outsource,
        "runs": {name: _run(call()) for name, call in calls.items()},
    }


def _run(call: str) -> dict[str, float]:
    command = [sys.executable, "-c", f"from benchmarks.offload import client, plain; {call}"]
    environment = tuned_environment(os.environ) if call.startswith("client") else None
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    figures: dict[str, float] = json.loads(output.splitlines()[-1])
    print(
        f"{call}: {figures['user_s'] + figures['system_s']:.1f} CPU-s an update", file=sys.stderr, flush=True
    )
    return figures


def offload_ratio(runs: Mapping[str, Mapping[str, float]]) -> float | None:
    """Processor time a token of stock peft in fp32 over that of the client."""
    if "float32" not in runs:
        return None
    cost = {name: (run["user_s"] + run["system_s"]) / run["tokens"] for name, run in runs.items()}
    return cost["float32"] / cost["client"]


def whole_model(slices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all layers of Llama-3.1-8B take, from two slices: f(32) = f(2) + 30·(f(4) − f(2)) / 2.

    Memory is left out: it is no linear function of layers.
    """
    (few, fewer_runs), (more, more_runs) = (
        (LLAMA_8B_SLICES[one["shape"]], one["runs"])
        for one in sorted(slices, key=lambda one: LLAMA_8B_SLICES[one["shape"]])
    )
    steps = (LLAMA_8B_LAYERS - few) / (more - few)
    runs: dict[str, dict[str, float]] = {}
    for name in fewer_runs.keys() & more_runs.keys():
        first, second = fewer_runs[name], more_runs[name]
        runs[name] = {
            key: first[key] + steps * (second[key] - first[key])
            for key in first
            if key not in ("tokens", "peak_rss_bytes")
        } | {"tokens": first["tokens"]}
    return {
        "shape": f"llama-3.1-8b, {LLAMA_8B_LAYERS} layers, extrapolated",
        "outsource": slices[0]["outsource"],
        "runs": {name: runs[name] for name in fewer_runs if name in runs},
    }


def table(measured: Sequence[Mapping[str, Any]]) -> str:
    """A row for every training, and what follows from slices."""
    slices = [one for one in measured if one["shape"] in LLAMA_8B_SLICES]
    rows = []
    for one in [*measured, *([whole_model(slices)] if len(slices) == len(LLAMA_8B_SLICES) else [])]:
        ratio = offload_ratio(one["runs"])
        for name, run in one["runs"].items():
            cpu = run["user_s"] + run["system_s"]
            rows.append(
                (
                    one["shape"]
                    + ("" if "lm_head" not in one.get("outsource", ()) else ", with output head"),
                    "client" if name == "client" else f"stock PEFT, {name}",
                    f"{1e3 * cpu / run['tokens']:.2f}",
                    f"{run['system_s'] / cpu:.0%}",
                    f"{run['faults'] / run['tokens']:.0f}",
                    f"{run['wall_s']:.1f}",
                    f"{run['peak_rss_bytes'] / 1e9:.2f}" if "peak_rss_bytes" in run else "",
                    f"{run['wire_bytes'] / run['tokens'] / 1e6:.2f}" if "wire_bytes" in run else "",
                    f"{ratio:.2f}" if ratio and name == "client" else "",
                )
            )
    header = ("", "", "CPU-ms a token", "of it system", "page faults a token", "s an update")
    return markdown((*header, "memory, GB", "MB a token", "offload ratio"), rows)


def main() -> None:
    """Parses arguments, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_json_option(parser)
    parser.add_argument("--shapes", nargs="+", choices=MODELS, default=[SMOLLM2])
    parser.add_argument("--updates", type=int, default=3, help="measured ones; one more comes before")
    parser.add_argument("--batch-tokens", type=int, help="tokens of an update; default: as for submit")
    parser.add_argument("--outsource", nargs="+", default=["*"], help="patterns, as for submit")
    parser.add_argument("--plain", nargs="*", choices=PLAIN, default=list(PLAIN))
    arguments = parser.parse_args()
    before = environment()
    measured = [
        measure(shape, arguments.updates, arguments.batch_tokens, arguments.outsource, arguments.plain)
        for shape in arguments.shapes
    ]
    print(table(measured))
    write({"shapes": measured, "environment": before}, arguments.json)


if __name__ == "__main__":
    main()
