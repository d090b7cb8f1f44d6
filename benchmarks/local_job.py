"""A job whose worker runs in this process: both halves of an engine, through the queue's messages."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from hetrain.public.protocol.messages import EvaluateTask
from hetrain.public.protocol.plan import Plan
from hetrain.secret.engine import JobOptions, client_engine
from hetrain.secret.engines.rlwe.hints import HintStore
from hetrain.secret.verification.job import Verification
from hetrain.train.hints import ignore_progress, make_hints
from hetrain.transport.in_process import InProcessChannel
from worker_gpu.device import Compute
from worker_gpu.service import Service
from worker_gpu.weights.store import WeightStore


class Clock:
    """Seconds and processor seconds since it was made or last read."""

    def __init__(self) -> None:
        self._begun = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Reads it and starts it again."""
        now, begun = (time.perf_counter(), time.process_time()), self._begun
        self._begun = now
        return now[0] - begun[0], now[1] - begun[1]


class LocalJob:
    """A client's sealer and its channel to a worker that has agreed to the plan; hints are made.

    Args:
        engine: its name.
        plan: the products.
        directory: of the checkpoint that the worker reads.
        verification: rows for the plan's products.
        compute: the worker's device and kernel.
    """

    def __init__(
        self, engine: str, plan: Plan, directory: Path, verification: Verification, compute: Compute
    ) -> None:
        self._load_plan = plan.to_bytes
        self._service = Service(compute, WeightStore(compute.device, {plan.model: str(directory)}))
        self._scratch = tempfile.TemporaryDirectory()  # lives as long as this
        self.worker = (0.0, 0.0)
        """Seconds and processor seconds of the worker's last product."""
        hints = HintStore(Path(self._scratch.name))
        self.sealer = client_engine(engine).open(plan, JobOptions(verification, hints=hints))
        self.channel = InProcessChannel(
            self._evaluate, lambda task, data: self._service.prepare(task, lambda: data)
        )
        self.channel.prepare(plan.model, engine, plan.to_bytes(), plan.digest, self.sealer.setup)
        if client_engine(engine).needs_hints:
            make_hints(hints, plan, self.channel, verification.weights, ignore_progress)

    def _evaluate(self, task: EvaluateTask, payload: memoryview) -> list[memoryview]:
        clock = Clock()
        parts = self._service.evaluate(task, self._load_plan, payload)
        self.worker = clock.read()
        return parts
