"""Cross-entropy over the vocabulary that never holds all logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

Head = Callable[[torch.Tensor], torch.Tensor]
_CHUNK = 256


def output_head(causal: PreTrainedModel) -> Head:
    """hidden [n, H] -> logits [n, V] in float32, with the model's own scaling and capping of logits."""
    config, projection = causal.config, causal.get_output_embeddings()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale = scale / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2

    def head(hidden: torch.Tensor) -> torch.Tensor:
        logits = projection(hidden).to(torch.float32)
        logits = logits if scale == 1.0 else logits * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return head


class _SummedLoss(torch.autograd.Function):
    """Σ_i −log p(target_i); the gradient with respect to the hidden states is computed on the way."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:  # type: ignore[no-untyped-def]
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], _CHUNK):
            rows = slice(start, start + _CHUNK)
            chunk = hidden[rows].detach().requires_grad_(gradient is not None)
            with torch.set_grad_enabled(gradient is not None):
                loss = cross_entropy(head(chunk), targets[rows], reduction="sum")
            total += loss.detach()
            if gradient is not None:
                (gradient[rows],) = torch.autograd.grad(loss, chunk)
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[no-untyped-def]
        return ctx.gradient * grad_output, None, None


def summed_loss(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
    """Σ over supervised tokens of −log p(target), a float32 scalar.

    Args:
        hidden: last hidden states [T, H].
        targets: int64 [T]; -100 where nothing is to be predicted. Logits are computed for the others only.
        head: from `output_head`.
    """
    supervised = (targets >= 0).nonzero().flatten()
    loss: torch.Tensor = _SummedLoss.apply(hidden.index_select(0, supervised), targets[supervised], head)
    return loss
