"""Memory for ciphertexts that is used again: to have fresh pages zeroed costs more than the arithmetic."""

from __future__ import annotations

import math
import threading
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Bytes = npt.NDArray[np.uint8]

_ALIGNMENT = 64  # a cache line, and the widest vector
_SMALLEST = 1 << 16  # below, the heap is as good
_STEPS = 8  # sizes between two powers of two, so that at most an eighth of a block lies idle
_IDLE_BYTES = 256 << 20

_local = threading.local()


def workspace(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """This thread's memory called `name`, contents undefined: the next call with this name takes it again."""
    buffers: dict[str, torch.Tensor] = _local.__dict__.setdefault("buffers", {})
    count = math.prod(shape)
    if name not in buffers or buffers[name].numel() < count or buffers[name].dtype != dtype:
        with torch.inference_mode(False):  # else nobody outside that mode could write to it
            buffers[name] = recycled_empty((count,), dtype)
    return buffers[name][:count].view(shape)


def recycled_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor in memory of one that is gone, or in new memory; contents undefined.

    glibc before 2.38 seldom finds room among freed blocks for the aligned ones that torch asks for, and what
    it then returns to the system comes back in pages that have to be zeroed.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(_POOL.take(nbytes)).view(dtype).view(shape)


def recycled_bytes(nbytes: int) -> Bytes:
    """As `recycled_empty`, without torch."""
    return _POOL.take(nbytes)


def size_class(nbytes: int) -> int:
    """The smallest size of blocks that holds `nbytes`: a power of two, or one of seven between two of them.

    >>> [size_class(n) for n in (1000, 1024, 1025)]
    [1024, 1024, 1152]
    """
    step = max((1 << max(nbytes - 1, 0).bit_length()) // (2 * _STEPS), 1)
    return -(-nbytes // step) * step


class Pool:
    """Blocks whose arrays are gone, by size class.

    An array's memory comes back by a finalizer, when its last user is gone: a tensor, a view, a memoryview.

    Args:
        idle_bytes: the most that waits for a next use.
    """

    def __init__(self, idle_bytes: int = _IDLE_BYTES) -> None:
        self._idle_bytes = idle_bytes
        self._idle: dict[int, list[Bytes]] = {}
        self._held = 0
        # A finalizer may run within `take`, when the collector does.
        self._lock = threading.RLock()

    def take(self, nbytes: int) -> Bytes:
        """uint8 [nbytes], aligned to 64 bytes, contents undefined."""
        if nbytes < _SMALLEST:
            return np.empty(nbytes, np.uint8)
        size = size_class(nbytes)
        with self._lock:
            blocks = self._idle.get(size)
            block = blocks.pop() if blocks else None
            if block is not None:
                self._held -= size
        if block is None:
            block = _aligned(size)
        # From a memoryview: numpy's views of it refer to this array then, and not past it to the block.
        array: Bytes = np.frombuffer(block.data[:nbytes], np.uint8)
        weakref.finalize(array, self._give_back, block).atexit = False
        return array

    @property
    def held(self) -> int:
        """Bytes that wait for a next use."""
        return self._held

    def _give_back(self, block: Bytes) -> None:
        with self._lock:
            if self._held + len(block) <= self._idle_bytes:
                self._idle.setdefault(len(block), []).append(block)
                self._held += len(block)


def _aligned(nbytes: int) -> Bytes:
    room: Any = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    aligned: Bytes = room[start : start + nbytes]
    return aligned


_POOL = Pool()
