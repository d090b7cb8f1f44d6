"""Copies between host and device, such that those of one task overlap the products of another.

Each thread that runs tasks (HETRAIN_WORKER_CONCURRENCY) has a CUDA stream of its own. Copies go through
pinned memory, which torch keeps for later copies. On a CPU nothing is copied.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

_local = threading.local()


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Queues the computations of a block on this thread's stream of `device`; has no effect on a CPU."""
    if device.type != "cuda":
        yield
        return
    streams: dict[torch.device, torch.cuda.Stream] = _local.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    with torch.cuda.stream(streams[device]):
        yield


def upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`host` on `device`. The copy is queued; `host` itself may change as soon as this returns."""
    if device.type != "cuda":
        return host.to(device)
    pinned = torch.empty(host.shape, dtype=host.dtype, pin_memory=True)
    pinned.copy_(host)
    return pinned.to(device, non_blocking=True)


def download(tensors: Sequence[torch.Tensor]) -> list[memoryview]:
    """The bytes of each of `tensors`, once all of them have arrived."""
    hosts = [_to_host(tensor.contiguous()) for tensor in tensors]
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return [host.numpy().data.cast("B") for host in hosts]


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor.cpu()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
