"""After the last attention no token depends on another: only those that predict a target are sent there.

The output projection and the MLP of the last block are sent for these tokens alone, forward and backward. The
others' products are zero there, and lead to nothing that is used.
"""

from __future__ import annotations

import torch

from hetrain.nn.remote import LinearGroup


class PredictingTokens:
    """Which of the T tokens of the forward pass at hand predict a target: `places`, int64, ascending."""

    def __init__(self) -> None:
        self.places = torch.empty(0, dtype=torch.long)

    def start(self, places: torch.Tensor) -> None:
        """Says which tokens predict, in any order and as often as they do."""
        self.places = places.unique()


class PredictingGroup:
    """A group whose linears come after the last attention: see the module.

    Args:
        group: evaluates what is left.
        members: how many linears it has.
        tokens: of the replica.
    """

    def __init__(self, group: LinearGroup, members: int, tokens: PredictingTokens) -> None:
        self._group, self._members, self._tokens = group, members, tokens
        self._input: torch.Tensor | None = None
        self._part: torch.Tensor | None = None
        self._asked = 0

    def output(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """What linear `index` makes of x, for the tokens that predict; zero for the others."""
        places = self._tokens.places
        if len(places) == x.shape[-2]:
            return self._group.output(x, index)
        if self._input is not x or self._part is None:
            self._input, self._part, self._asked = x, x.index_select(-2, places), 0
        y = self._group.output(self._part, index)
        self._asked += 1
        if self._asked == self._members:
            self._input = self._part = None
        return y.new_zeros(*x.shape[:-1], y.shape[-1]).index_copy(-2, places, y)
