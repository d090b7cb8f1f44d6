"""Engines whose evaluating half is one function of a task: they know nothing of a job in advance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hetrain.public.protocol.messages import EvaluateTask, Header
from hetrain.public.protocol.plan import Plan
from worker_gpu.device import Compute

Product = Callable[[Compute, torch.Tensor, EvaluateTask, memoryview], list[memoryview]]


@dataclass(frozen=True)
class StatelessEngine:
    """See `worker_gpu.engines.Engine`. `product` multiplies; all it needs comes with the task."""

    compute: Compute
    product: Product

    @property
    def description(self) -> str:
        """Device and kernel."""
        return self.compute.description

    def prepare(self, plan: Plan, setup: Header) -> None:
        """There is nothing to agree on."""

    def evaluate(self, matrix: torch.Tensor, task: EvaluateTask, payload: memoryview) -> list[memoryview]:
        """See `worker_gpu.engines.Engine.evaluate`."""
        return self.product(self.compute, matrix, task, payload)
