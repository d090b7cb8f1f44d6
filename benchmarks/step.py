"""A whole encrypted update against a plain PEFT step on the same cores.

``python -m benchmarks.step --json FILE``

Plain: stock peft in fp32, the median of repeated steps over a micro-batch. Encrypted: ``hetrain submit`` with
default settings, embedded broker and worker included, each update of `--in-flight` micro-batches; seconds per
micro-batch without the first update; ``hetrain prepare`` makes the model's hints before. Bytes are
those of ciphertexts and results, both passes. Memory is the largest resident set of a whole run.

``--shape llama-3.2-1b`` takes a model of exactly that shape with random weights, made in the cache directory
on first use. The plain step in fp32 may be too large for the machine: ``--no-plain`` leaves it out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
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
from benchmarks.output import add_json_option, write
from benchmarks.shapes import MODELS, SMOLLM2
from hetrain.config import BatchingConfig, LoraConfig
from hetrain.public.errors import HetrainError
from hetrain.secret.engine import client_engine

ROW_TOKENS = 512


def main() -> None:
    """Parses arguments, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_json_option(parser)
    parser.add_argument("--shape", choices=MODELS, default=SMOLLM2)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per micro-batch")
    parser.add_argument("--updates", type=int, default=4, help="updates in the measured window")
    parser.add_argument("--repeats", type=int, default=5, help="plain steps, before and after")
    parser.add_argument("--plain", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--in-flight", type=int, default=BatchingConfig.in_flight, help="as of hetrain submit"
    )
    parser.add_argument("--engine", default="rlwe")
    arguments = parser.parse_args()
    if arguments.tokens < 1 or arguments.tokens % ROW_TOKENS:
        parser.error(f"--tokens is a multiple of {ROW_TOKENS}, the length of a row")
    if min(arguments.updates, arguments.repeats, arguments.in_flight) < 1:
        parser.error("--updates, --repeats and --in-flight are at least 1")
    try:
        figures = measure(arguments, MODELS[arguments.shape]())
    except HetrainError as error:
        raise SystemExit(str(error)) from error
    print(json.dumps(figures, indent=2))
    write(figures, arguments.json)


def measure(arguments: argparse.Namespace, model: str) -> dict[str, Any]:
    """Plain steps, encrypted ones, and plain ones again."""
    before = environment()
    if client_engine(arguments.engine).needs_hints:
        run_watched([sys.executable, "-m", "cli", "prepare", model, "--quiet"])
    size = arguments.tokens, arguments.repeats
    plain_runs = [plain_steps(model, *size)] if arguments.plain else []
    encrypted = measure_encrypted(model, arguments)
    plain_runs += [plain_steps(model, *size)] if arguments.plain else []
    figures = {
        "shape": arguments.shape,
        "engine": arguments.engine,
        "tokens": arguments.tokens,
        "encrypted": encrypted,
        "environment": before,
        "load_after": os.getloadavg(),
    }
    if not plain_runs:
        return figures
    seconds = [second for run in plain_runs for second in run["seconds"]]
    plain_s = statistics.median(seconds)
    return figures | {
        "plain_s": plain_s,
        "plain_steps_s": seconds,
        "plain_peak_rss_bytes": max(run["peak_rss_bytes"] for run in plain_runs),
        "ratio_to_plain_peft": encrypted["seconds_per_micro_batch"] / plain_s,
    }


def measure_encrypted(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds per micro-batch of ``hetrain submit``, over all updates but the first."""
    tokens, updates, in_flight = arguments.tokens, arguments.updates, arguments.in_flight
    with tempfile.TemporaryDirectory() as scratch:
        data, output = Path(scratch) / "rows.jsonl", Path(scratch) / "out"
        write_text_rows(data, rows=32, tokens=ROW_TOKENS)
        command = [sys.executable, "-m", "cli", "submit", str(data), "--output-dir", str(output)]
        command += [
            "--model-name-or-path",
            model,
            "--engine",
            arguments.engine,
            "--max-steps",
            str(updates + 1),
        ]
        command += ["--max-length", str(ROW_TOKENS), "--micro-batch-tokens", str(tokens), "--quiet"]
        command += ["--in-flight", str(in_flight), "--batch-tokens", str(in_flight * tokens)]
        peaks = run_watched(command)
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    window = records[in_flight:]
    if any(record["tokens"] != tokens for record in records):
        raise SystemExit("a micro-batch was not full: the figures would not compare")
    seconds = (window[-1]["elapsed_s"] - records[in_flight - 1]["elapsed_s"]) / len(window)
    parts = ("seconds", "encrypt_s", "wait_s", "verify_s", "decrypt_s", "server_s", "bytes_up", "bytes_down")
    means = {part: statistics.mean(record[part] for record in window) for part in parts}
    # A run takes long: what is known already goes to standard error.
    print(f"{seconds:.1f} s per micro-batch", file=sys.stderr, flush=True)
    return {
        "updates": updates,
        "in_flight": in_flight,
        "seconds_per_micro_batch": seconds,
        "seconds_per_token": seconds / tokens,
        "mb_per_token": (means["bytes_up"] + means["bytes_down"]) / tokens / 1e6,
        "peak_rss_bytes": peaks,
        "per_micro_batch": means,
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


def plain_steps(model: str, tokens: int, repeats: int) -> dict[str, Any]:
    """What `plain` prints, from a process of its own, whose memory is gone when the next one starts."""
    call = f"plain({model!r}, {tokens}, {repeats})"
    command = [sys.executable, "-c", f"from benchmarks.step import plain; {call}"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, Any] = json.loads(output.splitlines()[-1])
    return figures


def plain(name_or_path: str, tokens: int, repeats: int) -> None:
    """Trains `repeats` plain steps after one that does not count.

    Prints the seconds of each, processor seconds of all, and the process's largest resident set in bytes.
    """
    import torch

    from benchmarks.plain import plain_model, plain_step
    from hetrain.data.packing import epochs
    from hetrain.data.tokenization import read_rows
    from hetrain.nn.lora import adapter_parameters
    from hetrain.train.session import open_base

    base = open_base(name_or_path)
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.jsonl"
        write_text_rows(data, rows=tokens // ROW_TOKENS, tokens=ROW_TOKENS)
        batch = next(epochs(read_rows(data, base.tokenizer, ROW_TOKENS), tokens, 0, 1))
    assert batch.n_tokens == tokens
    model = plain_model(base.files.directory, LoraConfig())
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-4)
    seconds, cpu_s = [], 0.0
    for _ in range(repeats + 1):
        begin, cpu_before = time.perf_counter(), time.process_time()
        _, gradients = plain_step(model, batch)
        for name, parameter in adapter_parameters(model).items():
            parameter.grad = gradients[name]
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
        cpu_s += time.process_time() - cpu_before if len(seconds) > 1 else 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    print(json.dumps({"seconds": seconds[1:], "cpu_s": cpu_s, "peak_rss_bytes": peak}))


if __name__ == "__main__":
    main()
