"""Activations that wait for the backward pass, kept in half the memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from hetrain.public.allocator import release_freed_memory

_SMALLEST = 1 << 14
_CHUNK = 1 << 25
_LARGEST_HALF = 32768.0

_Place = tuple[int, int, tuple[int, ...], tuple[int, ...], int]


class _Arena:
    """Memory for float16 values that all live until the same moment, and for the next ones after that.

    Taken from the heap one by one, they would lie between short-lived buffers and keep it from shrinking.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._chunks: list[torch.Tensor] = []
        self._chunk = self._used = 0

    def take(self, count: int) -> torch.Tensor:
        """Room for `count` values, uninitialised."""
        while True:
            if self._chunk == len(self._chunks):
                self._chunks.append(self._new_chunk(max(count, _CHUNK)))
            chunk = self._chunks[self._chunk]
            if self._used + count <= len(chunk):
                break
            self._chunk, self._used = self._chunk + 1, 0
        self._used += count
        return chunk[self._used - count : self._used]

    def _new_chunk(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.float16, device=self._device)

    def reset(self) -> None:
        """Gives all of it to the next values."""
        self._chunk = self._used = 0


@dataclass(frozen=True, eq=False)
class _Half:
    """scale·values with values in float16; a power of two keeps outliers in range."""

    values: torch.Tensor
    scale: float

    def restore(self) -> torch.Tensor:
        restored = self.values.to(torch.float32)
        return restored if self.scale == 1.0 else restored.mul_(self.scale)


class HalfSaver:
    """Stores what autograd saves as float16, 11 bits of precision, each tensor once.

    Only large float32 tensors that are no parameters: those are never copied. A saver serves one forward pass
    after another: the next one may begin when the backward pass of the last has ended.

    Args:
        parameters: the model's, which stay as they are (views of them, too).
    """

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self._kept = {p.untyped_storage().data_ptr() for p in parameters}
        self._arenas: dict[torch.device, _Arena] = {}
        self._moved = 0
        # By place in memory. The storage's weak reference keeps its address from being given away.
        self._packed: dict[_Place, tuple[StorageWeakRef, _Half]] = {}

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within this context, what autograd saves is packed; what an earlier one has packed is lost."""
        for arena in self._arenas.values():
            arena.reset()
        try:
            with saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._packed.clear()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Half:
        storage = tensor.untyped_storage()
        if tensor.dtype != torch.float32 or tensor.numel() < _SMALLEST or storage.data_ptr() in self._kept:
            return tensor
        reference = StorageWeakRef(storage)
        place = (
            reference.cdata,
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor._version,
        )
        if place not in self._packed:
            self._count(tensor)
            self._packed[place] = reference, self._halve(tensor.detach())
        return self._packed[place][1]

    def _unpack(self, packed: torch.Tensor | _Half) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        self._count(packed.values)
        return packed.restore()

    def _count(self, tensor: torch.Tensor) -> None:
        """Tidies the heap up after every so many values that went in or out."""
        self._moved += tensor.numel()
        if self._moved > _CHUNK:
            self._moved = 0
            release_freed_memory()

    def _halve(self, tensor: torch.Tensor) -> _Half:
        if tensor.device not in self._arenas:
            self._arenas[tensor.device] = _Arena(tensor.device)
        values = self._arenas[tensor.device].take(tensor.numel()).view(tensor.shape)
        largest = float(torch.linalg.vector_norm(tensor, math.inf))
        scale = 1.0
        if _LARGEST_HALF < largest < math.inf:
            scale = 2.0 ** math.ceil(math.log2(largest / _LARGEST_HALF))
        values.copy_(tensor if scale == 1.0 else tensor / scale)
        return _Half(values, scale)
