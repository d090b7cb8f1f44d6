"""Evaluating half of `clear`: the same product on an operand in clear. For tests and baselines."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hetrain.public.errors import WireError
from hetrain.public.protocol.messages import EngineHeader, EvaluateTask, Header
from hetrain.public.protocol.plan import Plan
from worker_gpu.copies import download, upload
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
        """Accepts every plan."""
        EngineHeader.from_wire(setup, where="setup")

    def evaluate(self, matrix: torch.Tensor, task: EvaluateTask, payload: memoryview) -> list[memoryview]:
        """W·x modulo 2^32 for the int32 operand x [K, T]; returns int32 [n, T]."""
        EngineHeader.from_wire(task.header, where=task.group)
        k = matrix.shape[1]
        if payload.nbytes == 0 or payload.nbytes % (4 * k):
            raise WireError(
                f"the operand has {payload.nbytes} bytes, no multiple of {4 * k}", where=task.group
            )
        operand = torch.frombuffer(payload, dtype=torch.int32).view(k, -1)
        return download([self.compute.kernel(matrix, upload(operand, self.compute.device))])
