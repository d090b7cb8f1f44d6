"""Weight prediction: where AdamW is going to move a parameter, from the moments that it has now.

A micro-batch whose gradients will be applied s updates later is computed at the adapter as it is expected to
be then (SpecTrain, arXiv 1809.02839, section III, for SGD with momentum; XPipe, arXiv 1911.04610, section
3.2, for Adam). The moments are taken to stay as they are, so s updates move a parameter by the sum of their
rates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def predicted(
    value: torch.Tensor, state: Mapping[str, torch.Tensor], group: Mapping[str, Any], rates: float
) -> torch.Tensor:
    """θ − Σ η·(m̂ / (√v̂ + ε) + λ·θ), with m̂ = m / (1 − β₁ᵗ) and v̂ = v / (1 − β₂ᵗ).

    Args:
        value: θ, a parameter of `torch.optim.AdamW`.
        state: its m ``exp_avg``, v ``exp_avg_sq`` and t ``step``; with t = 0 θ is expected to stay.
        group: its group's β ``betas``, ε ``eps`` and λ ``weight_decay``.
        rates: Σ η, the learning rates of the updates to come.

    Returns:
        A new tensor like `value`.
    """
    steps = float(state["step"])
    moved = value.detach().clone()
    if steps == 0 or rates == 0:
        return moved
    beta1, beta2 = group["betas"]
    mean = state["exp_avg"] / (1 - beta1**steps)
    deviation = (state["exp_avg_sq"] / (1 - beta2**steps)).sqrt_().add_(group["eps"])
    return moved.mul_(1 - rates * group["weight_decay"]).addcdiv_(mean, deviation, value=-rates)
