"""Exact products of signed 8-bit digits with int8 weights: the worker's one heavy operation.

An operand is P planes of digits D_l, int8 [N, K], of the integers c = Σ_l 2^(8l)·D_l. For int8 W [n, K] each
kernel computes P matrices P_l, int32 [N, n], such that

    Σ_l 2^(8l)·P_l = Σ_l 2^(8l)·D_l·Wᵀ = c·Wᵀ

exactly, on any device of torch. Only `int8_products` gives each P_l = D_l·Wᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import pad

from hetrain.public.errors import ParameterError
from hetrain.public.workspace import unaligned_empty, workspace
from worker_gpu import int16

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""int32 [P, N, n] from int8 [P, N, K] and int8 [n, K], by rows or transposed. On a CPU the result lies in
memory that this thread's next product overwrites."""

# torch._int_mm requires on CUDA: more than 16 rows, inner and outer widths in multiples of 8.
_MIN_ROWS, _MULTIPLE = 17, 8
_MAX_INNER = 130_000  # |D_l·Wᵀ| ≤ K·2^14 < 2^31 and, for four digits, |c·Wᵀ| ≤ K·2^7·0x80808080 < 2^55
_EXACT_BITS = 53
# Words of a slab's products: on a CPU smaller slabs cost more time between products than its cache saves.
_CPU_SLAB_WORDS, _GPU_SLAB_WORDS = 1 << 24, 1 << 26
_SLAB_MULTIPLE = 64


def slabs(planes: torch.Tensor, rows: int) -> Iterator[slice]:
    """Slices of W's rows, each but the last of one multiple of 64: they bound the memory of products."""
    words = _CPU_SLAB_WORDS if planes.device.type == "cpu" else _GPU_SLAB_WORDS
    multiples = -(-rows // _SLAB_MULTIPLE)
    count = -(-multiples // max(words // planes[:, :, 0].numel() // _SLAB_MULTIPLE, 1))
    step = -(-multiples // count) * _SLAB_MULTIPLE
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def int8_products(planes: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """See `Kernel`: one int8 product of all planes."""
    (count, tokens, k), n = planes.shape, len(matrix)
    _require_inner(k)
    left = _padded(planes.view(count * tokens, k), max(_MIN_ROWS - count * tokens, 0), -k % _MULTIPLE)
    right = _padded(matrix, -n % _MULTIPLE, -k % _MULTIPLE)
    if planes.is_cuda:
        right = right.contiguous()  # the layout that every generation of cuBLAS multiplies
    out = _scratch("products", (len(left), len(right)), torch.int32, planes.device)
    torch._int_mm(left, right.t(), out=out)
    return out[: count * tokens].view(count, tokens, -1)[:, :, :n]


def int16_products(
    planes: torch.Tensor, matrix: torch.Tensor, instructions: str | None = None
) -> torch.Tensor:
    """See `Kernel`: products of 12-bit digits in C, on CPUs, by the named instruction set or the best.

    Raises:
        NotImplementedError: on a GPU, or where no kernel was compiled.
    """
    count, tokens, k = planes.shape
    _require_inner(k)
    products = _scratch("products", (count, tokens, len(matrix)), torch.int32, planes.device)
    int16.multiply(planes, matrix, products, instructions)
    return products


def float64_products(planes: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """See `Kernel`: one float64 product S = c·Wᵀ, as S mod 2^t, zeros, ⌊S / 2^t⌋ with t = 8·(P − 1).

    The fall-back where int8 products are not exact (some processors saturate) and nothing was compiled. S is
    summed over so many columns at a time that every partial sum stays below 2^53: |c| < 2^(8P), |W| ≤ 2^7.
    """
    count, _, k = planes.shape
    _require_inner(k)
    top = 8 * (count - 1)
    columns = 1 << (_EXACT_BITS - 8 * count - 7)
    total = torch.zeros(planes.shape[1], len(matrix), dtype=torch.int64, device=planes.device)
    for first in range(0, k, columns):
        part = slice(first, first + columns)
        c = combined(planes[:, :, part], torch.float64)
        total += (c @ matrix[:, part].to(torch.float64).t()).to(torch.int64)
    products = _scratch("products", (count, *total.shape), torch.int32, planes.device).zero_()
    products[0] = total & ((1 << top) - 1)
    products[-1] = total >> top
    return products


def reference(planes: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """c·Wᵀ, int64 [N, n], on the CPU: slow, and obviously right."""
    return combined(planes, torch.int64) @ matrix.to(torch.int64).t()


def combined(planes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Σ_l 2^(8l)·X_l of X [P, ...] in this type: exact in int64 and float64, modulo 2^32 in int32."""
    total = planes[-1].to(dtype, copy=True)
    for plane in reversed(planes[:-1].unbind()):
        total.mul_(256).add_(plane)
    return total


def new_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory of the caller's."""
    if device.type == "cpu":
        return unaligned_empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def _scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory until this thread's next product. On a GPU torch's allocator keeps freed memory."""
    return workspace(name, shape, dtype) if device.type == "cpu" else new_memory(shape, dtype, device)


def _padded(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """`matrix` with rows and columns of zeros appended; itself if there are none."""
    return pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix


def _require_inner(k: int) -> None:
    if k > _MAX_INNER:
        raise ParameterError(f"an inner dimension of {k} would overflow, {_MAX_INNER} at most")


KERNELS: dict[str, Kernel] = {"int8": int8_products, "int16": int16_products, "float64": float64_products}
"""In the order of preference."""
