"""LoRA dropout that depends on the micro-batch alone."""

from __future__ import annotations

import torch
from torch import nn


class SeededDropout(nn.Module):
    """Inverted dropout with its own generator: x·mask/(1-p). Does nothing while `generator` is None.

    Micro-batches run in several threads: masks from torch's global generator would depend on their order.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.generator: torch.Generator | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x with a part of its values set to zero."""
        return x if self.generator is None else self.apply_mask(x, self.generator)

    def apply_mask(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """x·mask/(1-p) with the mask that `generator` draws next."""
        kept = torch.rand(x.shape, generator=generator) >= self.p
        return x * kept.to(x.device, x.dtype) / (1 - self.p)
