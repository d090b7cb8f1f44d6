"""Memory for ciphertexts that is used again: to have fresh pages zeroed costs more than the arithmetic."""

from __future__ import annotations

import math
import threading

import numpy as np
import torch

_local = threading.local()


def workspace(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """This thread's memory called `name`, contents undefined: the next call with this name takes it again."""
    buffers: dict[str, torch.Tensor] = _local.__dict__.setdefault("buffers", {})
    count = math.prod(shape)
    if name not in buffers or buffers[name].numel() < count or buffers[name].dtype != dtype:
        with torch.inference_mode(False):  # else nobody outside that mode could write to it
            buffers[name] = unaligned_empty((count,), dtype)
    return buffers[name][:count].view(shape)


def unaligned_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """New memory, contents undefined, from numpy.

    glibc before 2.38 seldom finds room among freed blocks for the aligned ones that torch asks for.
    """
    bytes_ = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(bytes_).view(dtype).view(shape)
