"""Cross-entropy over the vocabulary that never holds all logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from hetrain.nn.families import logit_scale_and_cap
from hetrain.public.allocator import release_freed_memory

_MOST_TOKENS = 512
_MOST_LOGITS = 1 << 26


@dataclass(frozen=True, eq=False)
class OutputHead:
    """hidden [n, H] -> float32 logits [n, V]: z = scale·projection(hidden), or cap·tanh(z/cap) if capped."""

    projection: nn.Module
    scale: float = 1.0
    cap: float | None = None

    @staticmethod
    def of(causal: PreTrainedModel) -> OutputHead:
        """The model's own, with its scaling and capping of logits."""
        return OutputHead(causal.get_output_embeddings(), *logit_scale_and_cap(causal.config))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits, without a gradient."""
        with torch.no_grad():
            return self._finish(self.projection(hidden).to(torch.float32))[0]

    def loss_and_gradient(
        self, hidden: torch.Tensor, targets: torch.Tensor, *, gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Σ_i −log p(target_i) and its gradient with respect to `hidden`, in the memory of the logits.

        softmax and cross-entropy have the gradient p − onehot(target), capping 1 − tanh², scaling the scale.
        """
        hidden = hidden.detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            projected = self.projection(hidden)
        with torch.no_grad():
            logits, slope = self._finish(projected.detach().to(torch.float32))
            logits -= logits.amax(dim=1, keepdim=True)
            chosen = targets[:, None]
            of_targets = logits.gather(1, chosen)
            total = logits.exp_().sum(dim=1, keepdim=True)
            loss = (total.log() - of_targets).sum()
            if not gradient:
                return loss, None
            logits /= total
            logits.scatter_add_(1, chosen, torch.full_like(of_targets, -1.0))
            if slope is not None:
                logits *= slope
            if self.scale != 1.0:
                logits *= self.scale
        return loss, torch.autograd.grad(projected, hidden, logits.to(projected.dtype))[0]

    def _finish(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and caps in place; also the slope of the cap, if there is one."""
        if self.scale != 1.0:
            logits *= self.scale
        if self.cap is None:
            return logits, None
        logits.div_(self.cap).tanh_()
        slope = 1 - logits.square()
        return logits.mul_(self.cap), slope


class _SummedLoss(torch.autograd.Function):
    """Σ_i −log p(target_i); the gradient with respect to the hidden states is computed on the way."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, targets: torch.Tensor, head: OutputHead) -> torch.Tensor:  # type: ignore[no-untyped-def]
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        vocabulary = next(iter(head.projection.parameters())).shape[0]
        step = min(max(_MOST_LOGITS // vocabulary, 1), _MOST_TOKENS)
        for start in range(0, hidden.shape[0], step):
            rows = slice(start, start + step)
            loss, part = head.loss_and_gradient(hidden[rows], targets[rows], gradient=gradient is not None)
            total += loss
            if gradient is not None and part is not None:
                gradient[rows] = part
            release_freed_memory()  # or the next logits would come to lie beside these
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[no-untyped-def]
        return ctx.gradient * grad_output, None, None


def summed_loss(hidden: torch.Tensor, targets: torch.Tensor, head: OutputHead) -> torch.Tensor:
    """Σ over supervised tokens of −log p(target), a float32 scalar.

    Args:
        hidden: last hidden states [T, H].
        targets: int64 [T]; -100 where nothing is to be predicted. Logits are computed for the others only.
        head: of the model.
    """
    supervised = (targets >= 0).nonzero().flatten()
    loss: torch.Tensor = _SummedLoss.apply(hidden.index_select(0, supervised), targets[supervised], head)  # type: ignore[no-untyped-call]
    return loss
