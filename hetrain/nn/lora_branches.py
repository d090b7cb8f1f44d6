"""The adapters of one group of linears, in one step with its frozen product.

Linear i of the group computes y_i = x·W_iᵀ + s_i·d_i(x)·A_iᵀ·B_iᵀ with LoRA's A_i [r, K], B_i [n_i, r] and
scale s_i = α/r (arXiv 2106.09685, section 4.1), d_i its dropout. With h_i = d_i(x)·A_iᵀ, g_i = s_i·dy_i·B_i:

    dB_i = s_i·dy_iᵀ·h_i          dA_i = g_iᵀ·d_i(x)          dx += d_i'(g_i·A_i)

All but the sums into y and dx are small: peft's own branch makes three matrices of the size of y on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hetrain.nn.dropout import SeededDropout


@dataclass(frozen=True, eq=False)
class LoraBranch:
    """The adapter of one linear of a group.

    Attributes:
        columns: those of the group's result that are the linear's.
        a: A [r, K].
        b: B [n, r].
        scale: s.
        dropout: of the branch's input; None for none.
    """

    columns: slice
    a: nn.Parameter
    b: nn.Parameter
    scale: float
    dropout: SeededDropout | None = None


class Branches:
    """What the forward pass of some branches leaves to the backward pass, beside x and h.

    Args:
        branches: of one group.
    """

    def __init__(self, branches: Sequence[LoraBranch]) -> None:
        self._branches = branches
        self._seeds = [_seed(branch.dropout) for branch in branches]
        self._ranks = [len(branch.a) for branch in branches]

    def add(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Adds all branches to y [T, n], in place. Returns their h, side by side: [T, Σ r_i]."""
        if self._are_alike:
            h = x @ self._stacked_a().t()
        else:
            dropped = (self._dropped(x, index) for index in range(len(self._branches)))
            pairs = zip(dropped, self._branches, strict=True)
            h = torch.cat([x_i @ branch.a.t() for x_i, branch in pairs], dim=1)
        for branch, h_i in zip(self._branches, h.split(self._ranks, dim=1), strict=True):
            y[:, branch.columns].addmm_(h_i, branch.b.t(), alpha=branch.scale)
        return h

    def gradients(
        self, dy: torch.Tensor, x: torch.Tensor, h: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """g side by side, [T, Σ r_i], and dA_1, dB_1, dA_2, ...

        Args:
            dy: gradient of the group's result [T, n].
            x: the group's input [T, K].
            h: from `add`.
        """
        found: list[torch.Tensor] = []
        g = torch.cat([branch.scale * (dy[:, branch.columns] @ branch.b) for branch in self._branches], dim=1)
        stacked = (g.t() @ x).split(self._ranks) if self._are_alike else None
        parts = zip(self._branches, g.split(self._ranks, dim=1), h.split(self._ranks, dim=1), strict=True)
        for index, (branch, g_i, h_i) in enumerate(parts):
            da = g_i.t() @ self._dropped(x, index) if stacked is None else stacked[index]
            db = h_i.t() @ dy[:, branch.columns]  # a third faster than the product that has dB's own layout
            found += [da, (branch.scale * db).t().contiguous()]
        return g, found

    def add_input_gradient(self, dx: torch.Tensor, g: torch.Tensor) -> None:
        """Adds the branches' gradients with respect to x to dx [T, K], in place."""
        if self._are_alike:
            dx.addmm_(g, self._stacked_a())
            return
        for index, (branch, g_i) in enumerate(zip(self._branches, g.split(self._ranks, dim=1), strict=True)):
            dx += self._dropped(g_i @ branch.a, index)

    @property
    def _are_alike(self) -> bool:
        """Whether all branches have the same input."""
        return all(seed is None for seed in self._seeds)

    def _stacked_a(self) -> torch.Tensor:
        return torch.cat([branch.a for branch in self._branches])

    def _dropped(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """d_i(x): always with the mask of the forward pass."""
        dropout, seed = self._branches[index].dropout, self._seeds[index]
        if dropout is None or seed is None:
            return x
        return dropout.apply_mask(x, torch.Generator().manual_seed(seed))


def _seed(dropout: SeededDropout | None) -> int | None:
    """Of this forward pass's mask, which is drawn again in the backward pass; None: nothing is dropped."""
    if dropout is None or dropout.generator is None:
        return None
    return int(torch.randint(1 << 62, (), generator=dropout.generator))
