"""Integer matrix products modulo 2^32: the worker's one heavy operation.

Each kernel computes  C = W·X mod 2^32  for int8 W [n, K] and int32 X [K, M], exactly, on any device that
torch knows. `hetrain` counts int32 overflow as the reduction modulo 2^32 that the ring asks for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import pad

from hetrain.public.errors import ParameterError

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# What torch._int_mm asks for on CUDA: more than 16 rows, inner and outer widths in multiples of 8.
_MIN_ROWS, _MULTIPLE = 17, 8
_MAX_INNER = 1 << 17
_DIGIT_OFFSET = -0x7F7F7F80  # 0x80808080 as int32


def int8_limbs(weights: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    """W·X mod 2^32 by four int8 products: X = Σ_l 2^{8l}·D_l with signed digits D_l in -128..127.

    The products run from the top digit down, C ← 2^8·C + W·D_l, so int32 overflow drops only multiples of
    2^32. Each is exact while K < 2^17, since |W·D_l| ≤ K·2^14 < 2^31.

    Args:
        weights: int8 [n, K].
        operand: int32 [K, M].

    Returns:
        int32 [n, M].
    """
    n, k = weights.shape
    m = operand.shape[1]
    if k >= _MAX_INNER:
        raise ParameterError(f"an inner dimension of {k} would overflow, {_MAX_INNER - 1} at most")
    weights = pad(weights, (0, -k % _MULTIPLE, 0, max(_MIN_ROWS - n, 0)))
    operand = pad(operand, (0, -m % _MULTIPLE, 0, -k % _MULTIPLE))
    # Adding 0x80 to every byte turns signed digits into unsigned ones; flipping each top bit turns them back.
    shifted = operand + _DIGIT_OFFSET
    result = torch._int_mm(weights, _digit(shifted, 3))
    for position in (2, 1, 0):
        result = torch.add(torch._int_mm(weights, _digit(shifted, position)), result, alpha=256)
    return result[:n, :m]


def _digit(shifted: torch.Tensor, position: int) -> torch.Tensor:
    return (shifted >> (8 * position)).to(torch.int8).bitwise_xor_(-128)


def float64_limbs(weights: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    """W·X mod 2^32 by two float64 products over 16-bit halves: X = 2^16·H + L, H signed, L in 0..2^16-1.

    Exact while K < 2^29, since |W·H| and |W·L| stay below K·2^23 < 2^52. The fall-back where int8 products
    are not exact (some processors saturate) or not there.
    """
    w = weights.to(torch.float64)
    high = w @ (operand >> 16).to(torch.float64)
    low = w @ (operand & 0xFFFF).to(torch.float64)
    return ((high.to(torch.int64) << 16) + low.to(torch.int64)).to(torch.int32)


def reference(weights: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    """W·X mod 2^32 on the CPU in int64, which wraps modulo 2^64: slow, and obviously right."""
    return (weights.to(torch.int64) @ operand.to(torch.int64)).to(torch.int32)


KERNELS: dict[str, Kernel] = {"int8": int8_limbs, "float64": float64_limbs}
