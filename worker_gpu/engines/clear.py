"""Evaluating half of `clear`: the same product on an operand that nobody hid. For tests and baselines."""

from __future__ import annotations

import torch

from hetrain.public.errors import WireError
from hetrain.public.protocol.messages import EvaluateTask
from worker_gpu.copies import download, upload
from worker_gpu.device import Compute


def evaluate(
    compute: Compute, matrix: torch.Tensor, task: EvaluateTask, payload: memoryview
) -> list[memoryview]:
    """W·x modulo 2^32 for the int32 operand x [K, T]; returns int32 [n, T]."""
    k = matrix.shape[1]
    if payload.nbytes == 0 or payload.nbytes % (4 * k):
        raise WireError(f"the operand has {payload.nbytes} bytes, no multiple of {4 * k}", where=task.group)
    operand = torch.frombuffer(payload, dtype=torch.int32).view(k, -1)
    return download([compute.kernel(matrix, upload(operand, compute.device))])
