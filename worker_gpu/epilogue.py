"""What follows a worker's three int8 products P_l = W·D_l: their sum modulo q, switched to 16 bits.

    b' = 2^6·Σ_l 2^(8l)·P_l mod q        u = round(b'·2^16 / q) mod 2^16

Exact in every version: in C, in one pass over memory, or element-wise in int64 on any device.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hetrain.public import compiled
from hetrain.public.compiled import require
from hetrain.public.lattice.ring import DROPPED_BITS, MODULUS, RESULT_BITS

_INTERFACE = 1

Switch = Callable[[Sequence[torch.Tensor], torch.Tensor], None]
"""Writes u, int16 [N, n], residues modulo 2^16, from three products, int32 [N, n]: any values."""


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("level", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("products", ctypes.c_void_p * 3),
        ("out", ctypes.c_void_p),
    )


def reference(products: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """See `Switch`. Every number stays below 2^54; a tie cannot be, since q is odd."""
    low, middle, high = (product.to(torch.int64) for product in products)
    b = ((low + (middle << 8) + (high << 16)) << DROPPED_BITS) % MODULUS
    out.copy_((((b << RESULT_BITS) + MODULUS // 2) // MODULUS).to(torch.int16))


def native(instructions: str | None = None) -> Switch | None:
    """The version in C, for the named instruction set or the best; None where none was compiled."""
    found = _library()
    if found is None:
        return None
    level = compiled.level(found, instructions)

    def switch(products: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        require(
            len(products) == 3,
            out.dtype == torch.int16,
            all(one.dtype == torch.int32 and one.shape == out.shape for one in products),
            all(one.is_contiguous() and one.device.type == "cpu" for one in (*products, out)),
        )
        pointers = (ctypes.c_void_p * 3)(*(one.data_ptr() for one in products))
        found.hetrain_switch(ctypes.byref(_Arguments(level, out.numel(), pointers, out.data_ptr())))

    return switch


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = compiled.load(Path(__file__).parent / "native", "_epilogue", _INTERFACE)
    if found is not None:
        found.hetrain_switch.argtypes, found.hetrain_switch.restype = [ctypes.c_void_p], None
    return found
