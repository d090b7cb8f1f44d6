"""Bare int8 products: what an exact product costs at the least."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.output import timed

_TRIALS = 3


def waiting(work: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """`work`, ending when the device has done it."""

    def run() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def int_mm(matrix: torch.Tensor, width: int, layout: str, count: int) -> Callable[[], None]:
    """`count` calls of `torch._int_mm` on int8 [n, k] × [k, width], operands of one layout."""
    return partial(_repeat, count, *_layouts(matrix, width)[layout])


def fastest_layout(matrix: torch.Tensor, width: int) -> str:
    """The layout in which `torch._int_mm` multiplies `matrix` by [k, width] fastest."""
    seconds = {}
    for name, (left, right) in _layouts(matrix, width).items():
        run = timed(waiting(partial(torch._int_mm, left, right), matrix.device))
        try:
            seconds[name] = min(run() for _ in range(_TRIALS))
        except RuntimeError:
            continue  # CUDA takes some layouts only
    return min(seconds, key=lambda name: seconds[name])


def _layouts(matrix: torch.Tensor, width: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Both operands by rows or by columns, the product as it is or transposed."""
    x = torch.randint(-128, 128, (matrix.shape[1], width), dtype=torch.int8, device=matrix.device)
    pairs = {}
    for w_order, w in (("rows", matrix.contiguous()), ("columns", matrix.t().contiguous().t())):
        for x_order, operand in (("rows", x), ("columns", x.t().contiguous().t())):
            pairs[f"W by {w_order}, X by {x_order}"] = w, operand
            pairs[f"W by {w_order}, X by {x_order}, transposed"] = operand.t(), w.t()
    return pairs


def _repeat(count: int, left: torch.Tensor, right: torch.Tensor) -> None:
    for _ in range(count):
        torch._int_mm(left, right)
