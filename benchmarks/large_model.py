"""Two layers of Llama-3.1-70B's shape, trained: ``python -m benchmarks.large_model --json FILE``.

Weights are random, in bfloat16 (7.6 GB). The embedded broker and two workers, each with one half of the
groups as its shard (``HETRAIN_SHARDS=0/2`` and ``1/2``), run beside the client. Of a micro-batch only one of
them computes at a time, so each may use all cores. The client, in a process of its own, trains `--updates`
updates of one micro-batch of `--tokens` tokens. Its opening ends with the first micro-batch: rows, the plan,
the workers' agreement, and all hints that the cache lacks. Seconds and processor seconds of training, user
and system, count from there. Memory is the largest resident set of each process from its start on, in which
pages of the checkpoint that are mapped from the disk count. Plain: the same step with stock peft in fp32, the
mean of `--plain` steps after one that does not count; it takes 20 GB.

Checkpoint and hints lie in ``HETRAIN_CACHE``: 10 GB, 12 with the output head on the workers.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.data import write_text_rows
from benchmarks.environment import environment
from benchmarks.output import add_json_option, markdown, write
from benchmarks.shapes import LLAMA_70B_SLICE, MODELS
from benchmarks.step import ROW_TOKENS, plain_steps
from hetrain.public.allocator import keep_freed_memory, tuned_environment
from tasks.supervisor.server import private_directory, start_server
from tasks.supervisor.worker_process import spawn_worker, stop

WORKERS = 2
_LOG_TAIL = 4000


@dataclass(frozen=True)
class Installation:
    """A running broker, and its workers' process ids."""

    url: str
    workers: tuple[int, ...]

    def worker_peaks(self) -> list[int]:
        """The largest resident set of each worker, bytes."""
        return [_peak_rss(worker) for worker in self.workers]


@contextmanager
def installation(model: str) -> Iterator[Installation]:
    """A broker, and workers that share `model`. Shows the end of their log when the block fails."""
    with ExitStack() as stack:
        directory = private_directory()
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        log = stack.enter_context((directory / "log").open("w+b"))
        server, url = start_server(directory, log)
        stack.callback(stop, [server])
        workers = [_worker(index, url, model, log) for index in range(WORKERS)]
        stack.callback(stop, workers)
        try:
            yield Installation(url, tuple(worker.pid for worker in workers))
        except BaseException:
            print(Path(log.name).read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL:], file=sys.stderr)
            raise


def _worker(index: int, url: str, model: str, log: IO[bytes]) -> subprocess.Popen[bytes]:
    settings = {
        "HETRAIN_BROKER_URL": url,
        "HETRAIN_MODELS": json.dumps([model]),
        "HETRAIN_SHARDS": f"{index}/{WORKERS}",
    }
    return spawn_worker(f"large-{index}", settings, log)


def _peak_rss(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024  # Linux counts in KiB


def client(model: str, tokens: int, updates: int, outsource: Sequence[str]) -> None:
    """Trains and reports on this process."""
    import hetrain

    keep_freed_memory()  # as the command line does, which also starts in `tuned_environment`
    began = time.perf_counter()
    readings: list[tuple[float, float]] = []
    steps: list[Any] = []

    def read(*_: object) -> None:
        readings.append((time.perf_counter(), time.process_time()))

    def on_step(metrics: Any) -> None:
        steps.append(metrics)
        read()

    config = hetrain.TrainingConfig(
        max_steps=updates, max_length=ROW_TOKENS, micro_batch_tokens=tokens, batch_tokens=tokens
    )
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.jsonl"
        write_text_rows(data, rows=tokens * updates // ROW_TOKENS, tokens=ROW_TOKENS)
        hetrain.finetune(
            data,
            model=model,
            workers=os.environ["HETRAIN_BROKER_URL"],
            output_dir=Path(scratch) / "out",
            training=config,
            outsourcing=hetrain.OutsourcingConfig(outsource=tuple(outsource)),
            on_start=read,
            on_prepare=read,
            on_step=on_step,
        )
    (begin, cpu_before), (end, cpu_after) = readings[-len(steps) - 1], readings[-1]
    done = sum(step.tokens for step in steps)
    figures = {
        "losses": [step.loss for step in steps],
        "tokens": done,
        "opening_s": begin - began,
        "seconds": end - begin,
        "client_cpu_s_per_token": (cpu_after - cpu_before) / done,
        "bytes_up_per_token": sum(step.bytes_up for step in steps) / done,
        "bytes_down_per_token": sum(step.bytes_down for step in steps) / done,
        "products": sum(step.products for step in steps),
        "rejected": sum(step.rejected for step in steps),
        "seconds_by_worker": {
            name: sum(step.workers.get(name, 0.0) for step in steps) for name in steps[0].workers
        },
        "client_peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(figures))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Updates, and plain steps."""
    before = environment()
    model = MODELS[LLAMA_70B_SLICE]()
    with installation(model) as running:
        call = f"client({model!r}, {arguments.tokens}, {arguments.updates}, {arguments.outsource})"
        command = [sys.executable, "-c", f"from benchmarks.large_model import client; {call}"]
        trained = json.loads(_output(command, running.url))
        peaks = running.worker_peaks()
    figures = {
        "shape": LLAMA_70B_SLICE,
        "tokens_per_update": arguments.tokens,
        "outsource": arguments.outsource,
        **trained,
        "worker_peak_rss_bytes": peaks,
        "environment": before,
        "load_after": os.getloadavg(),
    }
    if arguments.plain:
        plain = plain_steps(model, arguments.tokens, arguments.plain)
        figures["plain_cpu_s_per_token"] = plain["cpu_s"] / arguments.plain / arguments.tokens
        figures["plain_peak_rss_bytes"] = plain["peak_rss_bytes"]
    return figures


def _output(command: list[str], broker: str) -> str:
    """The last line of what a command prints, which finds the broker's address in its environment."""
    environment = tuned_environment(os.environ) | {"HETRAIN_BROKER_URL": broker}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return output.splitlines()[-1]


def table(figures: Mapping[str, Any]) -> str:
    """A row for the client, each worker and stock PEFT."""
    tokens, updates = figures["tokens"], len(figures["losses"])
    plain = figures.get("plain_cpu_s_per_token")
    cost = figures["client_cpu_s_per_token"]
    ratio = "" if plain is None else f"{plain / cost:.2f}"
    megabytes = (figures["bytes_up_per_token"] + figures["bytes_down_per_token"]) / 1e6
    rows = [
        (
            f"client, {updates} updates of {figures['tokens_per_update']} tokens",
            f"{figures['client_peak_rss_bytes'] / 1e9:.1f}",
            f"{1e3 * cost:.0f}",
            f"{megabytes:.2f}",
            f"{1e3 * figures['seconds'] / tokens:.0f}",
            ratio,
        )
    ]
    rows += [
        (f"worker {index} of {WORKERS}", f"{peak / 1e9:.1f}", "", "", "", "")
        for index, peak in enumerate(figures["worker_peak_rss_bytes"], 1)
    ]
    if plain is not None:
        memory = f"{figures['plain_peak_rss_bytes'] / 1e9:.1f}"
        rows.append(("stock PEFT, float32", memory, f"{1e3 * plain:.0f}", "", "", ""))
    header = ("", "memory, GB", "CPU-ms a token", "MB a token", "ms a token", "offload ratio")
    return markdown(header, rows)


def main() -> None:
    """Parses arguments, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_json_option(parser)
    parser.add_argument("--tokens", type=int, default=ROW_TOKENS, help="of a micro-batch, which is an update")
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--outsource", nargs="+", default=["*"], help="patterns, as for submit")
    parser.add_argument(
        "--plain", type=int, default=1, metavar="STEPS", help="of stock peft; 0 leaves it out"
    )
    arguments = parser.parse_args()
    if arguments.tokens < 1 or arguments.tokens % ROW_TOKENS:
        parser.error(f"--tokens is a multiple of {ROW_TOKENS}, the length of a row")
    figures = measure(arguments)
    print(table(figures))
    write(figures, arguments.json)


if __name__ == "__main__":
    main()
