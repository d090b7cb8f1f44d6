"""A whole encrypted update against a plain PEFT step on the same cores.

``python -m benchmarks.step --json FILE``

Plain: stock peft in fp32, the median of repeated steps over the same tokens. Encrypted: ``hetrain submit``
with default settings, embedded broker and worker included; seconds per update in the steady state, that is
between updates at which the pipeline is full.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.data import write_text_rows
from benchmarks.environment import environment
from hetrain.train.settings import FlightSettings

ROW_TOKENS = 512


def main() -> None:
    """Parses arguments, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per micro-batch")
    parser.add_argument("--updates", type=int, default=4, help="updates in the measured window")
    parser.add_argument("--repeats", type=int, default=5, help="plain steps")
    parser.add_argument("--engine", default="rlwe")
    parser.add_argument(
        "--hints", action=argparse.BooleanOptionalAction, help="as of hetrain submit; default: measure both"
    )
    arguments = parser.parse_args()
    before = environment()
    plain = _in_process("plain", arguments.tokens, arguments.repeats)
    modes = [False, True] if arguments.hints is None else [arguments.hints]
    encrypted = {
        "with_hints" if hints else "without_hints": measure_encrypted(
            arguments.engine, arguments.tokens, arguments.updates, hints=hints
        )
        for hints in modes
    }
    again = _in_process("plain", arguments.tokens, arguments.repeats)
    plain_s = statistics.median(plain + again)
    ratios = {name: mode["seconds_per_update"] / plain_s for name, mode in encrypted.items()}
    figures = {
        "engine": arguments.engine,
        "tokens": arguments.tokens,
        "plain_s": plain_s,
        "plain_steps_s": plain + again,
        # With default settings: a job of this length uses hints.
        "ratio_to_plain_peft": ratios.get("with_hints", ratios.get("without_hints")),
        "ratios": ratios,
        **encrypted,
        "environment": before,
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


def measure_encrypted(engine: str, tokens: int, updates: int, *, hints: bool) -> dict[str, Any]:
    """Seconds per update of ``hetrain submit`` over a window of `updates` updates with the pipeline full."""
    in_flight = FlightSettings().in_flight
    with tempfile.TemporaryDirectory() as scratch:
        data, output = Path(scratch) / "rows.jsonl", Path(scratch) / "out"
        write_text_rows(data, rows=32, tokens=ROW_TOKENS)
        # in_flight updates to fill the pipeline before the window, and as many after it while it drains.
        steps = updates + 2 * in_flight
        command = [sys.executable, "-m", "cli", "submit", str(data), "--output-dir", str(output)]
        command += ["--engine", engine, "--max-steps", str(steps), "--max-length", str(ROW_TOKENS)]
        command += ["--micro-batch-tokens", str(tokens), "--quiet", "--hints" if hints else "--no-hints"]
        peaks = run_watched(command)
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    window = records[in_flight : in_flight + updates]
    if any(record["tokens"] != tokens for record in records):
        raise SystemExit("a micro-batch was not full: the figures would not compare")
    seconds = window[-1]["elapsed_s"] - records[in_flight - 1]["elapsed_s"]
    parts = ("seconds", "encrypt_s", "wait_s", "decrypt_s", "server_s", "bytes_up", "bytes_down")
    return {
        "updates": updates,
        "in_flight": in_flight,
        "seconds_per_update": seconds / updates,
        "peak_rss_bytes": peaks,
        "per_micro_batch": {part: statistics.mean(record[part] for record in window) for part in parts},
    }


def run_watched(command: list[str]) -> dict[str, int]:
    """Runs a command of hetrain; the largest resident set of its own process and of its worker's."""
    peaks = {"client": 0, "worker": 0}
    client = psutil.Popen(command)
    while client.poll() is None:
        with suppress(psutil.Error):
            peaks["client"] = max(peaks["client"], client.memory_info().rss)
            for child in client.children(recursive=True):
                if "worker" in child.cmdline():
                    peaks["worker"] = max(peaks["worker"], child.memory_info().rss)
        time.sleep(0.1)
    if client.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {client.returncode}")
    return peaks


def _in_process(what: str, tokens: int, repeats: int) -> list[float]:
    """Runs a measurement in a process of its own, so that its memory is gone when the next one starts."""
    command = [sys.executable, "-c", f"from benchmarks.step import {what}; {what}({tokens}, {repeats})"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds: list[float] = json.loads(output.splitlines()[-1])
    return seconds


def plain(tokens: int, repeats: int) -> None:
    """Prints the seconds of `repeats` plain steps, after one that does not count."""
    import torch

    from benchmarks.plain import plain_model, plain_step
    from hetrain.nn.lora import LoraSettings, adapter_parameters
    from hetrain.train.packing import epochs
    from hetrain.train.rows import read_rows
    from hetrain.train.session import open_base

    base = open_base("smollm2-135m")
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.jsonl"
        write_text_rows(data, rows=tokens // ROW_TOKENS, tokens=ROW_TOKENS)
        batch = next(epochs(read_rows(data, base.tokenizer, ROW_TOKENS), tokens, 0, 1))
    assert batch.n_tokens == tokens
    model = plain_model(base.checkpoint.directory, LoraSettings())
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-4)
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        _, gradients = plain_step(model, batch)
        for name, parameter in adapter_parameters(model).items():
            parameter.grad = gradients[name]
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
    print(json.dumps(seconds[1:]))


if __name__ == "__main__":
    main()
