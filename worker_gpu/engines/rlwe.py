"""Evaluating half of `rlwe`: b' = W·b and a' = W·a modulo 2^32, then modulus switching. No keys.

Ciphertext matrices as in "Private LoRA Fine-tuning of Open-Source LLMs with Homomorphic Encryption"
(arXiv 2505.07329), with the reduction to plaintext products of Bae, Cheon, Hanrot, Park and Stehlé
(CRYPTO 2024, ePrint 2024/1284) in its simplest form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hetrain.public.lattice.header import RlweHeader
from hetrain.public.lattice.masks import expand_mask
from hetrain.public.lattice.result_format import A_SHIFT, B_SHIFT
from hetrain.public.protocol.messages import EngineHeader, EvaluateTask, Header
from hetrain.public.protocol.plan import Plan
from worker_gpu.copies import download, upload
from worker_gpu.device import Compute
from worker_gpu.kernels import blocks, new_memory


@dataclass(frozen=True)
class RlweEngine:
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
        """Modulus-switched W·b and, if the header has a mask seed, W·a: the planes of its `ResultFormat`."""
        header = RlweHeader.from_wire(task.header, where=task.group)
        b = header.result_format.read_operand(payload, matrix.shape[1], where=task.group)
        planes = [switch_b(self._multiply(matrix, b))]
        if header.seed is not None:
            a = expand_mask(header.seed, len(b), header.result_format.parameters.dimension)
            planes += switch_a(self._multiply(matrix, a))
        return download(planes)

    def _multiply(self, matrix: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
        return self.compute.kernel(matrix, upload(operand, self.compute.device))


def switch_b(values: torch.Tensor) -> torch.Tensor:
    """round(v / 2^16) modulo 2^16, as int16."""
    switched = new_memory(values.shape, torch.int16, values.device)
    for rows in blocks(values):
        rounded = values[rows] + (1 << (B_SHIFT - 1))
        rounded >>= B_SHIFT
        switched[rows] = rounded
    return switched


def switch_a(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """round(v / 2^8) modulo 2^24, as its high 16 bits (int16) and its low 8 bits (uint8)."""
    high = new_memory(values.shape, torch.int16, values.device)
    low = new_memory(values.shape, torch.uint8, values.device)
    for rows in blocks(values):
        rounded = values[rows] + (1 << (A_SHIFT - 1))
        rounded >>= A_SHIFT
        low[rows] = rounded
        rounded >>= 16 - A_SHIFT
        high[rows] = rounded
    return high, low
