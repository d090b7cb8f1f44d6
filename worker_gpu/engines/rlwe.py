"""Evaluating half of `rlwe`: b' = W·b and a' = W·a modulo 2^32, then modulus switching. No keys.

Ciphertext matrices as in "Private LoRA Fine-tuning of Open-Source LLMs with Homomorphic Encryption"
(arXiv 2505.07329), with the reduction to plaintext products of Bae, Cheon, Hanrot, Park and Stehlé
(CRYPTO 2024, ePrint 2024/1284) in its simplest form.
"""

from __future__ import annotations

import torch

from hetrain.public.errors import WireError
from hetrain.public.lattice.masks import PublicSeed, expand_mask
from hetrain.public.lattice.parameters import (
    MODULUS_BITS,
    PARAMETER_SETS,
    SWITCHED_A_BITS,
    SWITCHED_B_BITS,
    ParameterSet,
)
from hetrain.public.protocol.messages import EvaluateTask
from worker_gpu.copies import download, upload
from worker_gpu.device import Compute
from worker_gpu.kernels import blocks, new_memory

_B_SHIFT = MODULUS_BITS - SWITCHED_B_BITS
_A_SHIFT = MODULUS_BITS - SWITCHED_A_BITS


def evaluate(
    compute: Compute, matrix: torch.Tensor, task: EvaluateTask, payload: memoryview
) -> list[memoryview]:
    """Modulus-switched W·b and W·a.

    Layout: round(b'/2^16) as int16 [n, N]; then, unless the header asks for b alone, round(a'/2^8) as high
    int16 [n, d·N] and low uint8 [n, d·N].
    """
    parameters = _parameters(task)
    seed = None if task.header.get("result") == "b" else PublicSeed.from_hex(task.header.get("mask_seed"))
    k = matrix.shape[1]
    expected = 4 * k * parameters.ring_degree
    if payload.nbytes != expected:
        raise WireError(f"the operand has {payload.nbytes} bytes, not {expected}", where=task.group)
    b = torch.frombuffer(payload, dtype=torch.int32).view(k, parameters.ring_degree)
    parts = [switch_b(compute.kernel(matrix, upload(b, compute.device)))]
    if seed is not None:
        a = expand_mask(seed, k, parameters.dimension)
        parts += switch_a(compute.kernel(matrix, upload(a, compute.device)))
    return download(parts)


def switch_b(values: torch.Tensor) -> torch.Tensor:
    """round(v / 2^16) modulo 2^16, as int16."""
    switched = new_memory(values.shape, torch.int16, values.device)
    for rows in blocks(values):
        rounded = values[rows] + (1 << (_B_SHIFT - 1))
        rounded >>= _B_SHIFT
        switched[rows] = rounded
    return switched


def switch_a(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """round(v / 2^8) modulo 2^24, as its high 16 bits (int16) and its low 8 bits (uint8)."""
    high = new_memory(values.shape, torch.int16, values.device)
    low = new_memory(values.shape, torch.uint8, values.device)
    for rows in blocks(values):
        rounded = values[rows] + (1 << (_A_SHIFT - 1))
        rounded >>= _A_SHIFT
        low[rows] = rounded
        rounded >>= 16 - _A_SHIFT
        high[rows] = rounded
    return high, low


def _parameters(task: EvaluateTask) -> ParameterSet:
    name = task.header.get("parameters")
    if not isinstance(name, str) or name not in PARAMETER_SETS:
        raise WireError(f"unknown parameter set {name!r}", where=task.group)
    return PARAMETER_SETS[name]
