"""Exact products in C by 16-bit multiplications: worker_gpu/native/int16.c, with the contract of `Kernel`."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from hetrain.public import compiled
from hetrain.public.compiled import INSTRUCTION_SETS, require, structure
from hetrain.public.workspace import workspace
from worker_gpu.threads import in_pieces

_INTERFACE = 1
_PLANES = (3, 4)
_PIECE_TERMS = 1 << 21  # less than this is not worth a thread
_Arguments = structure(
    "level planes tokens n k plane_stride token_stride row_stride column_stride"
    " out_plane_stride out_token_stride operand* matrix* out* workspace*"
)


def multiply(
    planes: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor, instructions: str | None = None
) -> None:
    """Writes P products, int32 [P, N, n], from P = 3 or 4 planes, int8 [P, N, K], and int8 [n, K].

    Args:
        planes: contiguous.
        matrix: by rows or transposed.
        out: its last dimension is contiguous.
        instructions: the instruction set, by name; the best by default.

    Raises:
        NotImplementedError: no kernel was compiled, or an operand is not on the CPU.
        ParameterError: the operands do not fit each other.
        UsageError: this machine has no such instruction set.
    """
    found = _library()
    if found is None or not planes.device.type == matrix.device.type == out.device.type == "cpu":
        raise NotImplementedError(
            "16-bit products are for CPUs, where hetrain was installed with a C compiler"
        )
    (count, tokens, k), n = planes.shape, len(matrix)
    require(
        (planes.dtype, matrix.dtype, out.dtype) == (torch.int8, torch.int8, torch.int32),
        count in _PLANES,
        planes.numel() > 0 < matrix.numel(),
        matrix.shape == (n, k),
        out.shape == (count, tokens, n),
        planes.is_contiguous(),
        out.stride(2) == 1,
    )
    strides = tokens * k, k, *_matrix_strides(matrix), out.stride(0), out.stride(1)
    level = compiled.level(found, instructions)

    def piece(some: slice) -> None:
        token, row = (slice(None), some) if n > tokens else (some, slice(None))
        d, w, y = planes[:, token], matrix[row], out[:, token, row]
        buffer = workspace("int16", (found.hetrain_workspace_bytes(),), torch.uint8)
        pointers = (one.data_ptr() for one in (d, w, y, buffer))
        found.hetrain_multiply(
            ctypes.byref(_Arguments(level, count, d.shape[1], len(w), k, *strides, *pointers))
        )

    in_pieces(piece, max(n, tokens), -(-n * tokens * k // _PIECE_TERMS))


def best_instructions() -> str | None:
    """The name of the best instruction set of this machine; None where no kernel was compiled."""
    found = _library()
    return INSTRUCTION_SETS[found.hetrain_best_level()] if found is not None else None


def _matrix_strides(matrix: torch.Tensor) -> tuple[int, int]:
    """From one row and from one column to the next, of which one is 1."""
    (n, k), (row, column) = matrix.shape, matrix.stride()
    if k == 1 or column == 1:
        return row, 1
    require(n == 1 or row == 1)
    return 1, column


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = compiled.load(Path(__file__).parent / "native", "_int16", _INTERFACE)
    if found is not None:
        found.hetrain_multiply.argtypes, found.hetrain_multiply.restype = [ctypes.c_void_p], None
        found.hetrain_workspace_bytes.argtypes = []
        found.hetrain_workspace_bytes.restype = ctypes.c_int64
    return found
