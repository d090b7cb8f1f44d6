"""Evaluating half of `clear`: the same product on an operand in clear. For tests and baselines."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hetrain.public.lattice.result_format import DIGITS, require_units
from hetrain.public.protocol.messages import EngineHeader, EvaluateTask, Header
from hetrain.public.protocol.plan import Plan
from hetrain.public.protocol.product import Product
from worker_gpu.copies import download, upload
from worker_gpu.device import Compute
from worker_gpu.kernels import combined, new_memory, slabs

_MAX_TOKENS = 1 << 16


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

    def check_operand(self, product: Product, task: EvaluateTask) -> None:
        """Any number of tokens, within bounds."""
        EngineHeader.from_wire(task.header, where=task.group)
        unit = DIGITS * product.k
        require_units(task.input.nbytes, unit, unit * _MAX_TOKENS, where=task.group)

    def evaluate(self, matrix: torch.Tensor, task: EvaluateTask, payload: memoryview) -> list[memoryview]:
        """x·Wᵀ modulo 2^32, int32 [T, n], for the digit planes int8 [3, T, K] of x."""
        EngineHeader.from_wire(task.header, where=task.group)
        n, k = matrix.shape
        require_units(payload.nbytes, DIGITS * k, DIGITS * k * _MAX_TOKENS, where=task.group)
        planes = upload(torch.frombuffer(payload, dtype=torch.int8).view(DIGITS, -1, k), self.compute.device)
        out = new_memory((planes.shape[1], n), torch.int32, planes.device)
        for rows in slabs(planes, n):
            out[:, rows] = combined(self.compute.kernel(planes, matrix[rows]), torch.int32)
        return download([out])
