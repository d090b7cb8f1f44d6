"""Products of bfloat16 matrices, summed in float32, on processors that have tiles for them (AMX).

torch rounds the result of such a product to bfloat16 as well, to three digits: too few for logits. oneMKL's
``cblas_gemm_bf16bf16f32``, which torch's build for Intel and AMD processors contains, does not round it.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

_ROW_MAJOR, _AS_STORED, _TRANSPOSED = 101, 111, 112


@functools.cache
def has_bfloat16_tiles() -> bool:
    """Whether `add_product` is there, and several times as fast as float32."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16")) and _gemm() is not None


def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 x ≈ high + low, both bfloat16: the error is at most 2^-17 of each value."""
    high = x.to(torch.bfloat16)
    return high, (x - high).to(torch.bfloat16)


def add_product(out: torch.Tensor, x: torch.Tensor, w: torch.Tensor, *, keep: bool = True) -> None:
    """out += x·w, or out = x·w unless `keep`. Requires `has_bfloat16_tiles`.

    Args:
        out: float32 [m, n]; values of a row lie side by side.
        x: bfloat16 [m, k], like `out`.
        w: bfloat16 [k, n], like `out`, or the transpose of such a matrix.
        keep: whether `out` has a value.
    """
    transposed = w.stride(0) == 1 and w.stride(1) != 1
    _require(out, torch.float32)
    _require(x, torch.bfloat16)
    _require(w.t() if transposed else w, torch.bfloat16)
    (m, n), k = out.shape, x.shape[1]
    if (x.shape[0], *w.shape) != (m, k, n):
        raise ValueError("the matrices do not fit each other")
    gemm = _gemm()
    assert gemm is not None
    order = (_ROW_MAJOR, _AS_STORED, _TRANSPOSED if transposed else _AS_STORED, m, n, k)
    left = (x.data_ptr(), x.stride(0))
    right = (w.data_ptr(), w.stride(1) if transposed else w.stride(0))
    gemm(*order, 1.0, *left, *right, float(keep), out.data_ptr(), out.stride(0))


def _require(matrix: torch.Tensor, dtype: torch.dtype) -> None:
    if matrix.dtype != dtype or matrix.dim() != 2 or matrix.stride(1) != 1 or matrix.device.type != "cpu":
        raise ValueError("a matrix has another type or layout than the product needs")


@functools.cache
def _gemm() -> Any | None:
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        found = ctypes.CDLL(str(path)).cblas_gemm_bf16bf16f32
    except (OSError, AttributeError):
        return None
    size, pointer, number = ctypes.c_int, ctypes.c_void_p, ctypes.c_float
    found.argtypes = [size] * 6 + [number, pointer, size, pointer, size, number, pointer, size]
    found.restype = None
    return found
