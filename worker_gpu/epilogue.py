"""What follows three int8 products P_l = D_l·Wᵀ: their sum modulo q, switched to 14 bits and packed.

    b' = 2^6·Σ_l 2^(8l)·P_l mod q        u = round(b'·2^14 / q) mod 2^14

Exact in every version: in C, in one pass over memory, or element-wise in int64 on any device.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hetrain.public import compiled
from hetrain.public.compiled import INSTRUCTION_SETS, require, structure
from hetrain.public.lattice.result_format import DIGITS, pack, packed_bytes
from hetrain.public.lattice.ring import DROPPED_BITS, MODULUS, RESULT_BITS
from worker_gpu.kernels import combined
from worker_gpu.threads import in_pieces

_INTERFACE = 2
_PIECE_WORDS = 1 << 16

Switch = Callable[[torch.Tensor, torch.Tensor], None]
"""Writes packed u, uint8 [N, 112·⌈n/64⌉], from three products, int32 [3, N, n]. Rows may be apart."""


@dataclass(frozen=True)
class Epilogue:
    """One version of it, and its name in logs."""

    name: str
    switch: Switch


_Arguments = structure("level tokens features product_stride out_stride low* middle* high* out*")


def _reference(products: torch.Tensor, out: torch.Tensor) -> None:
    """See `Switch`. Every number stays below 2^54; a tie cannot be, since q is odd."""
    u = combined_modulo(products).mul_(1 << RESULT_BITS).add_(MODULUS // 2).floor_divide_(MODULUS)
    out.copy_(pack(u.to(torch.int16)))


def combined_modulo(products: torch.Tensor, dropped_bits: int = DROPPED_BITS) -> torch.Tensor:
    """2^dropped_bits·Σ_l 2^(8l)·P_l mod q in 0..q − 1: int64 [N, n] of P ≤ 4 products int32 [P, N, n]."""
    return combined(products, torch.int64).mul_(1 << dropped_bits).remainder_(MODULUS)


REFERENCE = Epilogue("torch", _reference)


def native(instructions: str | None = None) -> Epilogue | None:
    """The version in C, for the named instruction set or the best; None where none was compiled."""
    found = _library()
    if found is None:
        return None
    level = compiled.level(found, instructions)

    def switch(products: torch.Tensor, out: torch.Tensor) -> None:
        _, tokens, features = products.shape
        require(
            (products.dtype, out.dtype) == (torch.int32, torch.uint8),
            len(products) == DIGITS,
            out.shape == (tokens, packed_bytes(features)),
            products.stride(2) == out.stride(1) == 1,
            products.device.type == out.device.type == "cpu",
        )

        def piece(some: slice) -> None:
            part = products[:, some]
            pointers = (one.data_ptr() for one in (*part, out[some]))
            strides = products.stride(1), out.stride(0)
            found.hetrain_switch(
                ctypes.byref(_Arguments(level, part.shape[1], features, *strides, *pointers))
            )

        in_pieces(piece, tokens, -(-products[0].numel() // _PIECE_WORDS))

    return Epilogue(INSTRUCTION_SETS[level], switch)


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = compiled.load(Path(__file__).parent / "native", "_epilogue", _INTERFACE)
    if found is not None:
        found.hetrain_switch.argtypes, found.hetrain_switch.restype = [ctypes.c_void_p], None
    return found
