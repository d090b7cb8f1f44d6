"""Memory that is used again belongs to one thread, and to no mode of torch."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from hetrain.public.workspace import Pool, recycled_empty, size_class, workspace


def test_the_same_name_is_the_same_memory_of_one_thread() -> None:
    with torch.inference_mode():
        first = workspace("test", (4, 6), torch.int32)
    first.fill_(7)  # outside the mode in which it was made
    again = workspace("test", (5,), torch.int32)
    assert again.data_ptr() == first.data_ptr()
    assert again.tolist() == [7] * 5
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(workspace, "test", (5,), torch.int32).result()
    assert other.data_ptr() != first.data_ptr()
    grown = workspace("test", (40, 40), torch.int32)
    assert grown.shape == (40, 40)
    assert workspace("test", (3,), torch.uint8).dtype == torch.uint8


def test_lasting_memory_is_never_handed_out_twice() -> None:
    kept = [recycled_empty((300, 100), torch.float32).fill_(i) for i in range(20)]
    assert [float(one.mean()) for one in kept] == list(range(20))


@pytest.mark.parametrize(
    "keep",
    [lambda a: a, lambda a: a[5:].data, lambda a: a[9:], torch.from_numpy],
    ids=str.split("array data view tensor"),
)
def test_memory_comes_back_when_its_last_user_is_gone(keep: Callable[[Any], Any]) -> None:
    pool = Pool()
    array = pool.take(1 << 20)
    address = array.ctypes.data
    assert address % 64 == 0
    user = keep(array)
    del array
    assert pool.held == 0
    assert pool.take(1 << 20).ctypes.data != address
    del user
    assert address in {pool.take((1 << 20) - 7).ctypes.data, pool.take(1 << 20).ctypes.data}


def test_no_more_is_kept_than_allowed() -> None:
    pool = Pool(idle_bytes=3 << 20)
    arrays = [pool.take(1 << 20) for _ in range(5)]
    arrays.clear()
    assert pool.held == 3 << 20
    first, second = pool.take(1 << 20), pool.take(1 << 20)
    assert pool.held == 1 << 20
    assert first.ctypes.data != second.ctypes.data


def test_a_size_class_wastes_at_most_an_eighth() -> None:
    for nbytes in [*range(1, 5000), *(random.Random(1).randrange(1 << 32) for _ in range(5000))]:
        assert nbytes <= size_class(nbytes) <= nbytes + max(nbytes // 8, 0) + 1
        assert size_class(size_class(nbytes)) == size_class(nbytes)
