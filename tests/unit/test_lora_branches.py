"""Adapters of a group against autograd of their definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hetrain.nn.dropout import SeededDropout
from hetrain.nn.lora_branches import Branches, LoraBranch

K, WIDTHS, RANKS = 12, (7, 5, 9), (3, 2, 4)


class _Recorded(SeededDropout):
    """Keeps its masks."""

    def apply_mask(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        self.mask = super().apply_mask(torch.ones(x.shape, dtype=x.dtype), generator)
        return x * self.mask


def _branches(dropout: float) -> list[LoraBranch]:
    random = torch.Generator().manual_seed(3)
    found, end = [], 4  # the group's first four columns have no adapter
    for n, r in zip(WIDTHS, RANKS, strict=True):
        a, b = (
            nn.Parameter(torch.randn(shape, generator=random, dtype=torch.float64))
            for shape in ((r, K), (n, r))
        )
        module = _Recorded(dropout) if dropout else None
        if module is not None:
            module.generator = torch.Generator().manual_seed(n)
        found.append(LoraBranch(slice(end, end := end + n), a, b, 0.5 + n, module))
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_result_and_gradients_are_those_of_the_definition(dropout: float) -> None:
    branches = _branches(dropout)
    x = torch.randn(11, K, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(11, 4 + sum(WIDTHS), dtype=torch.float64)
    y, dx = torch.zeros_like(dy), torch.zeros_like(x)
    with torch.no_grad():
        subject = Branches(branches)
        h = subject.add(y, x)
        g, gradients = subject.gradients(dy, x, h)
        subject.add_input_gradient(dx, g)

    masks = [getattr(branch.dropout, "mask", torch.ones(())) for branch in branches]
    expected = torch.zeros_like(dy)
    for branch, mask in zip(branches, masks, strict=True):
        own = branch.scale * (x * mask) @ branch.a.t() @ branch.b.t()
        expected = expected + nn.functional.pad(
            own, (branch.columns.start, dy.shape[1] - branch.columns.stop)
        )
    leaves = [x, *(value for branch in branches for value in (branch.a, branch.b))]
    wanted = torch.autograd.grad(expected, leaves, dy)
    for got, want in zip((y, dx, *gradients), (expected, *wanted), strict=True):
        torch.testing.assert_close(got, want)


def test_every_branch_and_pass_has_its_own_mask() -> None:
    dropout = _Recorded(0.5)
    dropout.generator = torch.Generator().manual_seed(1)
    a, b = nn.Parameter(torch.ones(2, K)), nn.Parameter(torch.ones(3, 2))
    twice = [LoraBranch(slice(0, 3), a, b, 1.0, dropout), LoraBranch(slice(3, 6), a, b, 1.0, dropout)]
    with torch.no_grad():
        results = [torch.zeros(50, 6), torch.zeros(50, 6)]
        for y in results:
            Branches(twice).add(y, torch.ones(50, K))
    columns = [y[:, first] for y in results for first in (0, 3)]
    assert all(not torch.equal(columns[i], columns[j]) for i in range(4) for j in range(i))
