"""Threads for compiled kernels, which give up the interpreter lock: as many as torch's operations take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch


def in_pieces(work: Callable[[slice], None], length: int, most: int) -> None:
    """Calls `work` with slices of range(`length`), one a thread and at most `most`, and waits for all.

    The first is this thread's own: to wake another one takes as long as a small product.
    """
    step = -(-length // max(min(torch.get_num_threads(), most), 1))
    first, *others = (slice(start, min(start + step, length)) for start in range(0, length, step))
    pending = [_pool().submit(work, piece) for piece in others]
    try:
        work(first)
    finally:
        wait(pending)
    for piece in pending:
        piece.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), "kernel")
