"""Activations that wait for the backward pass, kept in half the memory."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

_SMALLEST = 1 << 14
_LARGEST_HALF = 32768.0

_Place = tuple[int, int, tuple[int, ...], tuple[int, ...], int]


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

    Only for large float32 tensors that are no parameters: those are never copied. Use one per forward pass.

    Args:
        parameters: the model's, which stay as they are (views of them, too).
    """

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self._kept = {p.untyped_storage().data_ptr() for p in parameters}
        # By place in memory. The storage's weak reference keeps its address from being given away.
        self._packed: dict[_Place, tuple[StorageWeakRef, weakref.ref[_Half]]] = {}

    def hooks(self) -> AbstractContextManager[None]:
        """What is saved within this context is packed."""
        hooks: AbstractContextManager[None] = saved_tensors_hooks(self._pack, _unpack)
        return hooks

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
        if place in self._packed and (known := self._packed[place][1]()) is not None:
            return known
        packed = _halve(tensor)
        self._packed[place] = reference, weakref.ref(packed)
        return packed


def _halve(tensor: torch.Tensor) -> _Half:
    largest = float(tensor.detach().abs().amax())
    if not largest > _LARGEST_HALF:  # NaN and infinity survive as they are
        return _Half(tensor.detach().to(torch.float16), 1.0)
    if math.isinf(largest):
        return _Half(tensor.detach().to(torch.bfloat16), 1.0)
    scale = 2.0 ** math.ceil(math.log2(largest / _LARGEST_HALF))
    return _Half((tensor.detach() / scale).to(torch.float16), scale)


def _unpack(packed: torch.Tensor | _Half) -> torch.Tensor:
    return packed.restore() if isinstance(packed, _Half) else packed
