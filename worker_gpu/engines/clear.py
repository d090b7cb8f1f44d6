"""Evaluating half of `clear`: the same product on an operand that nobody hid. For tests and baselines."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hetrain.public.errors import WireError
from hetrain.public.plan import Plan
from hetrain.public.wire import EvaluateTask, Header
from worker_gpu.device import Compute


@dataclass(frozen=True)
class ClearEngine:
    """See `worker_gpu.engines.Engine`."""

    compute: Compute

    @property
    def description(self) -> str:
        """Device and kernel."""
        return self.compute.description

    def prepare(self, plan: Plan, setup: Header) -> None:
        """There is nothing to agree on."""

    def evaluate(self, matrix: torch.Tensor, task: EvaluateTask, payload: memoryview) -> list[memoryview]:
        """See `worker_gpu.engines.Engine.evaluate`."""
        return evaluate(self.compute, matrix, task, payload)


def evaluate(
    compute: Compute, matrix: torch.Tensor, task: EvaluateTask, payload: memoryview
) -> list[memoryview]:
    """W·x modulo 2^32 for the int32 operand x [K, T]; returns int32 [n, T]."""
    k = matrix.shape[1]
    if payload.nbytes == 0 or payload.nbytes % (4 * k):
        raise WireError(f"the operand has {payload.nbytes} bytes, no multiple of {4 * k}", where=task.group)
    operand = torch.frombuffer(payload, dtype=torch.int32).view(k, -1)
    result = compute.kernel(matrix, operand.to(compute.device))
    return [memoryview(result.contiguous().cpu().numpy()).cast("B")]
