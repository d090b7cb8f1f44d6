"""Several jobs share workers: each gets the adapter that it gets alone, and none waits for another to end."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.convergence import cosine
from hetrain.train.updater import Tensors
from tests.harness.forkserver import forked_workers
from tests.harness.processes import HANDBOOK, broker_server, hetrain
from tests.harness.waiting import eventually

TOKENS = 48
COMMON: tuple[object, ...] = (
    "--quiet",
    "--max-length",
    TOKENS,
    "--micro-batch-tokens",
    TOKENS,
    "--lora-dropout",
    0.1,
)
COMMON += ("--learning-rate", 1e-2, "--lora-r", 4)


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A training job: its lines of the handbook, how many updates, and how many micro-batches in each."""

    name: str
    engine: str
    lines: tuple[int, int]
    seed: int
    updates: int
    width: int

    def run(self, model: Path, url: str, directory: Path) -> Path:
        """Trains. Returns the output directory."""
        data, output = directory / f"{self.name}.jsonl", directory / self.name
        data.write_text("".join(HANDBOOK.read_text().splitlines(keepends=True)[slice(*self.lines)]))
        size = ("--seed", self.seed, "--max-steps", self.updates, "--in-flight", self.width)
        size += ("--batch-tokens", TOKENS * self.width)
        where = ("--broker-url", url, "--output-dir", output, "--model-name-or-path", model)
        done = hetrain("submit", data, *where, "--engine", self.engine, *size, *COMMON)
        assert done.returncode == 0, done.stderr
        return output

    def done(self, directory: Path) -> int:
        """Micro-batches that it has finished."""
        metrics = directory / self.name / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0


BIG = Job("big", "clear", (0, 60), seed=1, updates=20, width=6)
SMALL = Job("small", "clear", (60, 90), seed=2, updates=5, width=1)
ENCRYPTED = Job("encrypted", "rlwe", (90, 120), seed=3, updates=2, width=1)
JOBS = (BIG, SMALL, ENCRYPTED)


def progress_at_ends(
    jobs: Sequence[Job], directory: Path, is_over: Callable[[], bool]
) -> dict[str, dict[str, int]]:
    """Micro-batches that every job has finished when each of them ends."""
    ends: dict[str, dict[str, int]] = {}

    def look() -> bool:
        now = {job.name: job.done(directory) for job in jobs}
        for job in jobs:
            if now[job.name] == job.updates * job.width:
                ends.setdefault(job.name, now)
        return is_over()

    eventually(look, 240)
    return ends


def adapter(output: Path) -> Tensors:
    tensors: Tensors = load_file(output / "adapter_model.safetensors")
    return tensors


def waiting(output: Path) -> float:
    """Seconds in which a micro-batch waits for workers, on average."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return float(sum(line["wait_s"] for line in lines)) / len(lines)


def test_jobs_that_share_a_fleet_get_the_adapters_they_get_alone(tiny_llama: Path, tmp_path: Path) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    together.mkdir()
    alone.mkdir()
    with broker_server() as broker, forked_workers(2, broker.url, tiny_llama, tmp_path / "workers.log"):
        assert hetrain("prepare", tiny_llama, "--broker-url", broker.url).returncode == 0
        with ThreadPoolExecutor(len(JOBS)) as pool:
            running = [pool.submit(job.run, tiny_llama, broker.url, together) for job in JOBS]
            ends = progress_at_ends(JOBS, together, lambda: all(each.done() for each in running))
            shared = {job.name: each.result() for job, each in zip(JOBS, running, strict=True)}
        solo = {job.name: job.run(tiny_llama, broker.url, alone) for job in JOBS}
    for name, path in shared.items():
        logger.warning("%s waits %.3f s, alone %.3f s", name, waiting(path), waiting(solo[name]))
    logger.warning("when one ends: %s", ends)
    adapters = {name: (adapter(path), adapter(solo[name])) for name, path in shared.items()}
    for one, other in (adapters[BIG.name], adapters[SMALL.name]):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert cosine(*adapters[ENCRYPTED.name]) > 0.99
    # None waits for the end of the one that keeps six times as much in the queue, nor does that stand still.
    assert 0 < ends[SMALL.name][BIG.name] < BIG.updates * BIG.width
    assert ends[ENCRYPTED.name][BIG.name] < BIG.updates * BIG.width
