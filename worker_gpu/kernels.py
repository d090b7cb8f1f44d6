"""Integer matrix products modulo 2^32: the worker's one heavy operation.

Each kernel computes  C = W·X mod 2^32  for int8 W [n, K] and int32 X [K, M], exactly, on any device of torch.
int32 overflow is the ring's reduction modulo 2^32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import pad

from hetrain.public.errors import ParameterError
from hetrain.public.workspace import unaligned_empty, workspace

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# torch._int_mm requires on CUDA: more than 16 rows, inner and outer widths in multiples of 8.
_MIN_ROWS, _MULTIPLE = 17, 8
_MAX_INNER = 1 << 17
_DIGIT_OFFSET = _TOP_BITS = -0x7F7F7F80  # 0x80808080 as int32
_CACHED_WORDS = 1 << 16
_SLAB_ROWS = 2048


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
    weights = _padded(weights, max(_MIN_ROWS - n, 0), -k % _MULTIPLE)
    digits = _digits(_padded(operand, -k % _MULTIPLE, -m % _MULTIPLE))
    result = new_memory((len(weights), digits.shape[2]), torch.int32, operand.device)
    for rows in _slabs(len(weights)):
        _combine(weights[rows], digits, result[rows])
    return result[:n, :m]


def _combine(weights: torch.Tensor, digits: torch.Tensor, out: torch.Tensor) -> None:
    """out = Σ_l 2^{8l}·W·D_l modulo 2^32, the sums block by block while they are in the cache."""
    products = [_scratch(f"product {i}", out.shape, torch.int32, out.device) for i in range(3)]
    for product, digit in zip((*products, out), digits, strict=True):
        torch._int_mm(weights, digit, out=product)
    for rows in blocks(out):
        total = out[rows]
        for product in reversed(products):
            torch.add(product[rows], total, alpha=256, out=total)


def _slabs(rows: int) -> list[slice]:
    """Slices of nearly equal length, 2048 rows at most: they bound the memory of three products."""
    count = -(-rows // _SLAB_ROWS)
    return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]


def _digits(operand: torch.Tensor) -> torch.Tensor:
    """D of X = Σ_l 2^{8l}·D_l with D_l in -128..127, in one pass: int32 [K, M] -> int8 [4, K, M].

    Adding 0x80 to every byte turns signed digits into unsigned ones; flipping each top bit turns them back.
    """
    digits = _scratch("digits", (4, *operand.shape), torch.int8, operand.device)
    for rows in blocks(operand):
        words = operand[rows] + _DIGIT_OFFSET
        words ^= _TOP_BITS
        digits[0, rows] = words
        for position in (1, 2, 3):
            words >>= 8
            digits[position, rows] = words
    return digits


def _padded(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """`matrix` with rows and columns of zeros appended; itself if there are none."""
    return pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix


def blocks(matrix: torch.Tensor) -> Iterator[slice]:
    """Slices of rows that fit a core's cache; on a GPU one slice of all rows."""
    step = len(matrix) if matrix.is_cuda else max(_CACHED_WORDS // max(matrix[:1].numel(), 1), 1)
    return (slice(start, start + step) for start in range(0, len(matrix), step))


def new_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory of the caller's."""
    return (
        unaligned_empty(shape, dtype)
        if device.type == "cpu"
        else torch.empty(shape, dtype=dtype, device=device)
    )


def _scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory until this thread's next product. On a GPU torch's allocator keeps freed memory."""
    return workspace(name, shape, dtype) if device.type == "cpu" else new_memory(shape, dtype, device)


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
