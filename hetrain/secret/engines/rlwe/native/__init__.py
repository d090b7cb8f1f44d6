"""The client's kernels in C: one pass over memory that fits the cache. See kernels.c.

Compiled when hetrain is installed, where there is a C compiler; else `hetrain.secret.engines.rlwe.kernels`
takes torch's version, which is three times slower and their reference.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from hetrain.public.errors import ParameterError
from hetrain.public.lattice.parameters import SLOTS

if TYPE_CHECKING:
    from hetrain.secret.engines.rlwe.kernels import Planes, ScaledOperand

_ALIGNMENT = 64
_INTERFACE = 1
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, None where there are none. Calls give up the interpreter lock."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.exists():
            break
    else:
        return None
    try:
        found = ctypes.CDLL(str(path))
        interface = found.hetrain_interface()
    except (OSError, AttributeError):  # compiled for another machine, or long ago
        return None
    if interface != _INTERFACE:
        return None
    found.hetrain_workspace_bytes.argtypes = []
    found.hetrain_workspace_bytes.restype = _SIZE
    found.hetrain_spectrum.argtypes = [_POINTER, _POINTER, _SIZE, _SIZE, *[_POINTER] * 3]
    sizes = [ctypes.c_int32, *[_SIZE] * 5, _INT, _SIZE]
    found.hetrain_encrypt.argtypes = [*[_POINTER] * 5, *sizes, *[_POINTER] * 4]
    found.hetrain_decrypt.argtypes = [*[_POINTER] * 5, *[_SIZE] * 6, *[_POINTER] * 4]
    for function in (found.hetrain_spectrum, found.hetrain_encrypt, found.hetrain_decrypt):
        function.restype = None
    return found


@functools.lru_cache(maxsize=16)
def _tables(ring_degree: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Constants of a transform of N/2 points, as kernels.c reads them: twist and twiddles."""
    points = ring_degree // 2
    angles = np.arange(points) * (math.pi / ring_degree)
    stages, size = [], points
    while size >= 4:
        angle = np.arange(size // 4) * (-2 * math.pi / size)
        powers = [function(k * angle) for k in (1, 2, 3) for function in (np.cos, np.sin)]
        stages.append(np.stack(powers, axis=1).ravel())
        size //= 4
    return np.stack([np.cos(angles), np.sin(angles)], axis=1), np.concatenate(stages)


_local = threading.local()


def _workspace(found: ctypes.CDLL) -> int:
    """The address of this thread's scratch memory, aligned to a cache line."""
    if not hasattr(_local, "memory"):
        _local.memory = np.empty(found.hetrain_workspace_bytes() + _ALIGNMENT, np.uint8)
    address: int = _local.memory.ctypes.data
    return address + -address % _ALIGNMENT


def _require(*conditions: bool) -> None:
    """C checks nothing: shapes, types and layout are checked here."""
    if not all(conditions):
        raise ParameterError("the operands of a native kernel do not fit each other")


class NativeSecret:
    """The spectrum of a secret int8 [d, N], in the order of the kernels' own transform. Never serialised."""

    def __init__(self, secret: torch.Tensor, found: ctypes.CDLL) -> None:
        _require(secret.dtype == torch.int8, secret.dim() == 2, secret.is_contiguous())
        self.rank, self.ring_degree = secret.shape
        _require(16 <= self.ring_degree <= SLOTS, self.ring_degree & (self.ring_degree - 1) == 0)
        points = self.ring_degree // 2
        self._tables = _tables(self.ring_degree)
        self._spectrum = np.empty((self.rank, points, 2))
        tables = (table.ctypes.data for table in self._tables)
        found.hetrain_spectrum(
            self._spectrum.ctypes.data, secret.data_ptr(), self.rank, points, *tables, _workspace(found)
        )

    def spectrum_and_tables(self) -> tuple[int, ...]:
        """The last arguments but one of both kernels: points, and addresses of twist, twiddles, spectrum."""
        arrays = (*self._tables, self._spectrum)
        return self.ring_degree // 2, *(array.ctypes.data for array in arrays)

    def __reduce__(self) -> NoReturn:
        """Refuses to be pickled or copied: a secret never leaves the memory it was drawn in."""
        raise TypeError("a secret cannot be serialised or copied")


@dataclass(frozen=True)
class NativeKernels:
    """See `hetrain.secret.engines.rlwe.kernels.Kernels`."""

    found: ctypes.CDLL
    name: str = "native"

    def transform(self, secret: torch.Tensor) -> NativeSecret:
        """See `Kernels.transform`."""
        return NativeSecret(secret, self.found)

    def encrypt(
        self, out: torch.Tensor, operand: ScaledOperand, start: int, masks: torch.Tensor,
        keystream: torch.Tensor, secret: NativeSecret,
    ) -> None:  # fmt: skip
        """See `Kernels.encrypt`."""
        x, inverse = operand.x, operand.inverse
        rows, tokens = len(out), len(x)
        _require(
            out.shape == (rows, secret.ring_degree),
            masks.shape == (rows, secret.rank * secret.ring_degree),
            keystream.numel() == 6 * out.numel(),
            start + rows <= x.shape[1],
            tokens <= secret.ring_degree,
            len(inverse) == tokens,
            (out.dtype, masks.dtype, keystream.dtype) == (torch.int32, torch.int32, torch.uint8),
            x.dtype == inverse.dtype == torch.float32,
            all(tensor.is_contiguous() for tensor in (out, masks, keystream, x, inverse)),
        )
        pointers = (tensor.data_ptr() for tensor in (out, masks, keystream, x, inverse))
        sizes = (operand.x_max, start, rows, x.shape[1], tokens, secret.rank, operand.eta)
        self.found.hetrain_encrypt(*pointers, *sizes, *secret.spectrum_and_tables(), _workspace(self.found))

    def decrypt(
        self, out: torch.Tensor, column: int, planes: Planes, scales: torch.Tensor, secret: NativeSecret
    ) -> None:
        """See `Kernels.decrypt`."""
        b, high, low = planes
        rows, (tokens, width) = len(b), out.shape
        _require(
            b.shape == (rows, secret.ring_degree),
            high.shape == low.shape == (rows, secret.rank * secret.ring_degree),
            column + rows <= width,
            tokens <= secret.ring_degree,
            len(scales) == tokens,
            (b.dtype, high.dtype, low.dtype) == (torch.int16, torch.int16, torch.uint8),
            out.dtype == scales.dtype == torch.float32,
            all(tensor.is_contiguous() for tensor in (out, b, high, low, scales)),
        )
        pointers = (tensor.data_ptr() for tensor in (out, b, high, low, scales))
        sizes = (column, rows, width, tokens, secret.rank)
        self.found.hetrain_decrypt(*pointers, *sizes, *secret.spectrum_and_tables(), _workspace(self.found))
