"""Activations that wait for the backward pass, in half the memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks

from hetrain.public.allocator import release_freed_memory

SMALLEST = 1 << 14
_CHUNK = 1 << 25
_LARGEST_HALF = 32768.0


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
                size = max(count, _CHUNK)
                self._chunks.append(torch.empty(size, dtype=torch.float16, device=self._device))
            chunk = self._chunks[self._chunk]
            if self._used + count <= len(chunk):
                break
            self._chunk, self._used = self._chunk + 1, 0
        self._used += count
        return chunk[self._used - count : self._used]

    @property
    def used(self) -> int:
        """Values in use; what is left over at the ends of chunks counts."""
        return sum(map(len, self._chunks[: self._chunk])) + self._used

    def reset(self) -> None:
        """Gives all of it to the next values."""
        self._chunk = self._used = 0


@dataclass(frozen=True, eq=False)
class Half:
    """scale·values, with values in float16; a power of two keeps outliers in range."""

    values: torch.Tensor
    scale: float

    def restore(self) -> torch.Tensor:
        """The float32 tensor."""
        restored = self.values.to(torch.float32)
        return restored if self.scale == 1.0 else restored.mul_(self.scale)


class HalfSaver:
    """Stores float32 tensors as float16, 11 bits of precision, until the next forward pass begins.

    Small tensors, other types and parameters, also views of them, are kept as they are.

    Args:
        parameters: the model's.
        device: of the activations.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], device: torch.device | str = "cpu") -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in parameters}
        self._arena = _Arena(torch.device(device))

    @property
    def stored_values(self) -> int:
        """Values stored since the last forward pass began."""
        return self._arena.used

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within this context, autograd saves through `pack`; what was packed earlier is lost."""
        self._arena.reset()
        try:
            with saved_tensors_hooks(self.pack, self.unpack):
                yield
        finally:
            release_freed_memory()

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | Half:
        """The tensor in the form in which it is kept; itself where that is as it is."""
        if (
            tensor.dtype != torch.float32
            or tensor.numel() < SMALLEST
            or tensor.untyped_storage().data_ptr() in self._parameters
        ):
            return tensor
        tensor = tensor.detach()
        smallest, largest = (float(extreme) for extreme in torch.aminmax(tensor))
        largest = max(-smallest, largest)
        scale = 1.0
        if _LARGEST_HALF < largest < math.inf:
            scale = 2.0 ** math.ceil(math.log2(largest / _LARGEST_HALF))
        values = self._arena.take(tensor.numel()).view(tensor.shape)
        return Half(values.copy_(tensor if scale == 1.0 else tensor / scale), scale)

    @staticmethod
    def unpack(packed: torch.Tensor | Half) -> torch.Tensor:
        """The tensor that was packed, contiguous if it was stored."""
        return packed.restore() if isinstance(packed, Half) else packed
