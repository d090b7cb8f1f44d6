"""Threads for compiled kernels, which give up the interpreter lock: as many as torch's operations take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def in_pieces(work: Callable[[slice], None], length: int, most: int) -> None:
    """Calls `work` with slices of range(`length`), one a thread and at most `most`, and waits for all."""
    step = -(-length // max(min(torch.get_num_threads(), most), 1))
    list(_pool().map(work, (slice(first, min(first + step, length)) for first in range(0, length, step))))


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), "kernel")
