"""Memory that is used again belongs to one thread, and to no mode of torch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from hetrain.public.workspace import unaligned_empty, workspace


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
    kept = [unaligned_empty((3, 5), torch.float32).fill_(i) for i in range(20)]
    assert [float(one.mean()) for one in kept] == list(range(20))
