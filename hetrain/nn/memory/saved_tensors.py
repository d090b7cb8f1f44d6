"""Activations that wait for the backward pass: kept in half the memory, and only those that must be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from hetrain.nn.memory.arena import Arena, Room
from hetrain.nn.memory.recompute import Place, Recorder, Source, View, strides_of
from hetrain.public.allocator import release_freed_memory

SMALLEST = 1 << 14
_TIDY_AFTER = 1 << 26
_LARGEST_HALF = 32768.0


@dataclass(frozen=True, eq=False)
class _Half:
    """scale·values with values in float16; a power of two keeps outliers in range."""

    arena: Arena
    room: Room
    scale: float
    operations: int = 0

    def restore(self) -> torch.Tensor:
        restored = self.arena.at(self.room).to(torch.float32)
        return restored if self.scale == 1.0 else restored.mul_(self.scale)


class HalfSaver:
    """Stores what autograd saves as float16, 11 bits of precision, each value once.

    Only large float32 tensors that are no parameters: those are never copied. What cheap operations make of
    others is not stored but computed again. A saver serves one forward pass after another: the next one may
    begin when the backward pass of the last has ended.

    Args:
        parameters: the model's, which stay as they are (views of them, too).
        limit: bytes that may stay in memory; see `Arena`.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], limit: int | None = None) -> None:
        self._limit = limit
        self._kept = {p.untyped_storage().data_ptr() for p in parameters}
        self._arenas: dict[torch.device, Arena] = {}
        self._moved = 0
        self._recorder = Recorder(self._is_large)
        self._sources: dict[Place, Source] = {}
        # Storages that are gone keep their addresses, by which places are told apart, as long as these live.
        self._references: list[StorageWeakRef] = []

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within this context, what autograd saves is packed; what an earlier one has packed is lost."""
        for arena in self._arenas.values():
            arena.reset()
        try:
            with saved_tensors_hooks(self._pack, self._unpack), self._recorder:
                yield
        finally:
            self._recorder.clear()
            self._sources.clear()
            self._references.clear()
            release_freed_memory()

    @property
    def stored_values(self) -> int:
        """Values that this forward pass has stored."""
        return sum(arena.used for arena in self._arenas.values())

    def _is_large(self, value: object) -> bool:
        return (
            isinstance(value, torch.Tensor)
            and value.dtype == torch.float32
            and value.numel() >= SMALLEST
            and value.untyped_storage().data_ptr() not in self._kept
        )

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | View:
        if not self._is_large(tensor):
            return tensor
        reference = StorageWeakRef(tensor.untyped_storage())
        place = Place.of(tensor, reference)
        source = self._find(place)
        if source is None:
            self._count(tensor)
            self._references.append(reference)
            source = self._sources[place] = self._halve(tensor.detach())
        return View(source, tuple(tensor.shape), strides_of(tensor))

    def _find(self, place: Place) -> Source | None:
        source = self._sources.get(place) or self._recorder.recipe(place, self._find)
        if source is not None:
            self._sources[place] = source
        return source

    def _unpack(self, packed: torch.Tensor | View) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        tensor = packed.restore()
        self._count(tensor)
        return tensor

    def _count(self, tensor: torch.Tensor) -> None:
        """Tidies the heap up after every so many values that went in or out."""
        self._moved += tensor.numel()
        if self._moved > _TIDY_AFTER:
            self._moved = 0
            release_freed_memory()

    def _halve(self, tensor: torch.Tensor) -> _Half:
        if tensor.device not in self._arenas:
            self._arenas[tensor.device] = Arena(tensor.device, self._limit)
        arena = self._arenas[tensor.device]
        room = arena.take(tensor.numel())
        half = arena.at(room)
        view = half.as_strided(tensor.shape, strides_of(tensor), half.storage_offset())
        view.copy_(tensor)
        if _largest(half) <= _LARGEST_HALF:
            return _Half(arena, room, 1.0)
        largest, scale = _largest(tensor), 1.0
        if _LARGEST_HALF < largest < math.inf:
            scale = 2.0 ** math.ceil(math.log2(largest / _LARGEST_HALF))
            view.copy_(tensor / scale)
        return _Half(arena, room, scale)


def _largest(values: torch.Tensor) -> float:
    """The largest magnitude; NaN if there is one."""
    smallest, largest = (float(extreme) for extreme in torch.aminmax(values))
    return max(-smallest, largest)
