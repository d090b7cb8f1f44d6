"""Keeping freed memory for the next ciphertext instead of handing it back to the system each time.

A step allocates and frees buffers of megabytes thousands of times. By default glibc maps each of them afresh
and the kernel zeroes every page: a quarter of the client's processor time, which `keep_freed_memory` and
`tuned_environment` together take to a twentieth.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Mapping
from pathlib import Path

# Parameters of mallopt(3), and the largest threshold that glibc accepts on 64-bit machines.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
_MMAP_THRESHOLD_MAX = 32 << 20
_KEEP_BYTES = (2 << 30) - 1
_GROW_BYTES = 64 << 20
_MUCH_BYTES = 1 << 30
_TUNABLES = "GLIBC_TUNABLES"
_TUNING = {
    # Pages of 2 MB where the kernel grants them, and no cache of small blocks: those that glibc before 2.38
    # cuts off an aligned block would stay there, and the hole that it leaves would be too small for the next.
    _TUNABLES: "glibc.malloc.hugetlb=1:glibc.malloc.tcache_count=0",
    "THP_MEM_ALLOC_ENABLE": "1",  # torch: the same for what it asks for
    # Threads of OpenMP that wait would spin on the cores that threads of our own kernels need.
    "OMP_WAIT_POLICY": "PASSIVE",
}
_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _MallInfo(ctypes.Structure):
    """``struct mallinfo2`` of mallinfo(3): of the heap, `uordblks` bytes are in use, `fordblks` are free."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _FIELDS.split())


def tuned_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with settings of glibc, torch and OpenMP, which these read when they are loaded.

    What it says of them already stays.
    """
    return {**_TUNING, **environment}


def restart_tuned() -> None:
    """Starts this program anew in `tuned_environment`, unless that is what it has, or it is not Linux."""
    environment = tuned_environment(os.environ)
    if sys.platform == "linux" and environment != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def release_freed_memory() -> None:
    """Gives back what is free within the heap, if that is much and more than is in use.

    torch asks for aligned blocks, and glibc before 2.38 seldom finds room for one between others, however
    much is free: a forward pass with 1.4 GB to keep grew the heap to 5.5 GB. But what is given back has to be
    zeroed by the kernel when it is needed again: a heap of 1.6 GB with 0.6 free, given back at every chance,
    costs 7 per cent of the client's time. What was given back glibc still counts as free, so what is resident
    decides. Elsewhere than with glibc on Linux does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallinfo2.restype = _MallInfo
        heap = libc.mallinfo2()
        if heap.fordblks > _MUCH_BYTES:
            unused = _anonymous_bytes() - heap.uordblks - heap.hblkhd
            if unused > max(_MUCH_BYTES, heap.uordblks):
                libc.malloc_trim(0)


def _anonymous_bytes() -> int:
    """What is resident of this process and of no file. Raises `OSError` where the system does not tell."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def keep_freed_memory() -> None:
    """Has glibc serve blocks of up to 32 MiB from one heap that is rarely trimmed; elsewhere does nothing.

    One heap for all threads, since those of other threads end at 64 MiB. Call it before they start.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_THRESHOLD, _MMAP_THRESHOLD_MAX)
        mallopt(_TRIM_THRESHOLD, _KEEP_BYTES)
        mallopt(_TOP_PAD, _GROW_BYTES)
