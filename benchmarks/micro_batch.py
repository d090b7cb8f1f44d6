"""What a micro-batch takes of the client, without a queue: ``python -m benchmarks.micro_batch --json FILE``.

Both passes with default settings, encrypted, in one thread that does the part of the worker, too:
what that takes is subtracted (getrusage). The output head stays on the client: slices of an outsourced one
are away in another thread, which would not be counted. `benchmarks.offload` has whole updates over the queue.
``--environment plain`` runs without the settings of the heap that the command line starts with.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import write_text_rows
from benchmarks.environment import environment
from benchmarks.output import add_json_option, markdown, write
from benchmarks.shapes import MODELS, SMOLLM2
from benchmarks.step import ROW_TOKENS
from hetrain.config import LoraConfig, TrainingConfig
from hetrain.data.packing import MicroBatch, epochs
from hetrain.data.tokenization import read_rows
from hetrain.nn.lora import adapter_parameters, add_adapter
from hetrain.nn.replica import Replica
from hetrain.nn.split import split_model
from hetrain.public.allocator import keep_freed_memory, restart_tuned
from hetrain.public.protocol.messages import EvaluateTask
from hetrain.public.system import flush_denormals
from hetrain.secret.engine import JobOptions, client_engine
from hetrain.secret.engines.rlwe.hints import client_hints
from hetrain.secret.verification.job import Verification, kept_rows
from hetrain.train.hints import ignore_progress, make_hints
from hetrain.train.session import BaseModelFiles, open_base, weights_of
from hetrain.train.step import run_step
from hetrain.train.updater import Snapshot
from hetrain.transport.in_process import InProcessChannel
from worker_gpu.device import choose_compute
from worker_gpu.service import Service
from worker_gpu.weights.store import WeightStore

INSIDE = ("model.layers.*",)
"""Patterns of all but the output head."""


@dataclass(frozen=True)
class Usage:
    """Seconds of this thread in its own code and in the kernel, and its page faults."""

    user_s: float = 0.0
    system_s: float = 0.0
    faults: int = 0

    @staticmethod
    def now() -> Usage:
        """Since the thread began."""
        used = resource.getrusage(resource.RUSAGE_THREAD)
        return Usage(used.ru_utime, used.ru_stime, used.ru_minflt)

    def __sub__(self, other: Usage) -> Usage:
        return Usage(self.user_s - other.user_s, self.system_s - other.system_s, self.faults - other.faults)

    def __add__(self, other: Usage) -> Usage:
        return self - (Usage() - other)


class MeteredWorker:
    """Evaluates tasks in this process, and counts what that takes.

    Args:
        base: the model.
    """

    def __init__(self, base: BaseModelFiles) -> None:
        self.spent = Usage()
        kept: dict[Any, Any] = {}
        self.split = split_model(
            base.files,
            INSIDE,
            lambda group, matrix: kept.update(kept_rows(group, matrix)),
        )
        plan, hints = self.split.plan, client_hints()
        self._plan = plan.to_bytes
        cpu = torch.device("cpu")
        self._service = Service(
            choose_compute(cpu), WeightStore(cpu, {plan.model: str(base.files.directory)})
        )
        weights = weights_of(base.files)
        verification = Verification(kept, weights)
        self.sealer = client_engine("rlwe").open(plan, JobOptions(verification, hints=hints))
        self.channel = InProcessChannel(
            self._evaluate, lambda task, data: self._service.prepare(task, lambda: data)
        )
        self.channel.prepare(plan.model, "rlwe", plan.to_bytes(), plan.digest, self.sealer.setup)
        make_hints(hints, plan, self.channel, weights, ignore_progress)

    def _evaluate(self, task: EvaluateTask, payload: memoryview) -> list[memoryview]:
        begin = Usage.now()
        parts = self._service.evaluate(task, self._plan, payload)
        self.spent += Usage.now() - begin
        return parts


def measure(name: str, repeats: int) -> dict[str, float]:
    """Means over all repeats but the first."""
    base = open_base(name)
    batch = _micro_batch(base)
    worker = MeteredWorker(base)
    model = add_adapter(worker.split, LoraConfig(), 0)
    snapshot = Snapshot({key: value.detach() for key, value in adapter_parameters(model).items()})
    replica = Replica(worker.split, model, worker.channel, worker.sealer)
    laps: list[dict[str, float]] = []
    for _ in range(repeats + 1):
        begin, worker.spent = Usage.now(), Usage()
        stats = run_step(replica, batch, snapshot, 0).stats
        spent = Usage.now() - begin - worker.spent
        cpu = spent.user_s + spent.system_s
        cryptography = stats.encrypt_s + stats.verify_s + stats.decrypt_s
        laps.append(
            {
                "client_ms": 1e3 * cpu / batch.n_tokens,
                "cryptography_ms": 1e3 * cryptography / batch.n_tokens,
                "system_share": spent.system_s / cpu,
                "faults": spent.faults / batch.n_tokens,
                "worker_ms": 1e3 * (worker.spent.user_s + worker.spent.system_s) / batch.n_tokens,
            }
        )
    means = {key: sum(lap[key] for lap in laps[1:]) / repeats for key in laps[0]}
    return means | {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _micro_batch(base: BaseModelFiles) -> MicroBatch:
    tokens = TrainingConfig().micro_batch_tokens
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.jsonl"
        write_text_rows(data, rows=tokens // ROW_TOKENS, tokens=ROW_TOKENS)
        rows = read_rows(data, base.tokenizer, ROW_TOKENS)
    return next(iter(epochs(rows, tokens, 0, 1)))


def table(figures: dict[str, Any]) -> str:
    """One row."""
    header = (
        "CPU-ms a token",
        "of it cryptography",
        "system",
        "page faults a token",
        "worker's",
        "memory, GB",
    )
    row = (
        f"{figures['client_ms']:.2f}",
        f"{figures['cryptography_ms']:.2f}",
        f"{figures['system_share']:.0%}",
        f"{figures['faults']:.0f}",
        f"{figures['worker_ms']:.2f}",
        f"{figures['peak_rss_bytes'] / 1e9:.2f}",
    )
    return markdown(header, [row])


def main() -> None:
    """Parses arguments, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_json_option(parser)
    parser.add_argument("--shape", choices=MODELS, default=SMOLLM2)
    parser.add_argument("--repeats", type=int, default=2, help="measured ones; one more comes before")
    parser.add_argument("--environment", choices=["tuned", "plain"], default="tuned")
    arguments = parser.parse_args()
    if arguments.environment == "tuned":
        restart_tuned()
    before = environment()
    keep_freed_memory()
    flush_denormals()
    torch.set_num_threads(1)
    figures = measure(MODELS[arguments.shape](), arguments.repeats) | {"environment": before}
    print(table(figures))
    write(figures, arguments.json)


if __name__ == "__main__":
    main()
