"""Cross-entropy over the vocabulary, of logits in slices, from the client's output head or from workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from hetrain.nn.families import logit_scale_and_cap
from hetrain.nn.fused import exponentials
from hetrain.public.allocator import release_freed_memory

MOST_TOKENS = 256
MOST_LOGITS = 1 << 26

PullBack = Callable[[Iterable[torch.Tensor]], torch.Tensor]
"""The gradient with respect to hidden states [n, H] of those with respect to slices of logits, in order."""


class Projection(Protocol):
    """Hidden states to logits, a slice of the vocabulary at a time."""

    @property
    def most_tokens(self) -> int:
        """The most hidden states at once."""
        ...

    def __call__(self, hidden: torch.Tensor) -> tuple[Iterator[torch.Tensor], PullBack]:
        """Projects hidden states [n, H].

        Returns:
            Slices of logits, float32 [n, V_i] with Σ V_i = V, which the caller may change; and the way back,
            which can be taken once, after the last slice.
        """
        ...


@dataclass(frozen=True, eq=False)
class LocalHead:
    """The client's own output head: a `Projection` in one slice.

    Attributes:
        module: that of the model.
    """

    module: nn.Module

    @property
    def most_tokens(self) -> int:
        """As many as have 2^26 logits, and no more than 256."""
        vocabulary = len(next(iter(self.module.parameters())))
        return min(max(MOST_LOGITS // vocabulary, 1), MOST_TOKENS)

    def __call__(self, hidden: torch.Tensor) -> tuple[Iterator[torch.Tensor], PullBack]:
        """See `Projection`."""
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad():
            projected = self.module(hidden)

        def pull_back(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
            (gradient,) = gradients
            return torch.autograd.grad(projected, hidden, gradient.to(projected.dtype))[0]

        return iter([projected.detach().to(torch.float32)]), pull_back


@dataclass(frozen=True, eq=False)
class _Slice:
    """e^(z − largest) of logits z [n, V_i] from word `first` on, and the slope of their cap, if any."""

    values: torch.Tensor
    first: int
    slope: torch.Tensor | None
    largest: torch.Tensor
    total: torch.Tensor


@dataclass(frozen=True, eq=False)
class OutputHead:
    """Logits z = scale·projection(hidden), or cap·tanh(z/cap) if capped."""

    projection: Projection
    scale: float = 1.0
    cap: float | None = None

    @staticmethod
    def of(causal: PreTrainedModel, projection: Projection) -> OutputHead:
        """With the model's scaling and capping of logits."""
        return OutputHead(projection, *logit_scale_and_cap(causal.config))

    def finish(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Scales and caps in place. Returns the slope of the cap, if there is one."""
        if self.scale != 1.0:
            logits *= self.scale
        if self.cap is None:
            return None
        logits.div_(self.cap).tanh_()
        slope = 1 - logits.square()
        logits *= self.cap
        return slope

    def loss_and_gradient(
        self, hidden: torch.Tensor, targets: torch.Tensor, *, gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Σ_i −log p(target_i) and its gradient with respect to `hidden`, in the memory of the logits.

        softmax and cross-entropy have the gradient p − onehot(target), capping 1 − tanh², scaling the scale.
        """
        slices, of_targets, first = [], torch.zeros(len(targets), device=hidden.device), 0
        logits, pull_back = self.projection(hidden)
        for values in logits:
            slope = self.finish(values)
            of_targets += _at(values, targets - first)
            found = _Slice(values, first, slope, *exponentials(values))
            slices.append(found if gradient else _without_values(found))
            first += values.shape[1]
        largest = torch.stack([each.largest for each in slices]).amax(dim=0)
        shares = [(each.largest - largest).exp_() for each in slices]
        total = torch.stack([each.total * share for each, share in zip(slices, shares, strict=True)]).sum(
            dim=0
        )
        loss = (total.log() + largest - of_targets).sum()
        if not gradient:
            return loss, None
        factors = [share / total for share in shares]
        return loss, pull_back(self._gradients(slices, factors, targets))

    def _gradients(
        self, slices: list[_Slice], factors: list[torch.Tensor], targets: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """With respect to each slice of what was projected; a slice's memory is free once it is taken."""
        for factor in factors:
            each = slices.pop(0)
            gradient = each.values.mul_(factor[:, None])
            rows, places = _those_within(gradient, targets - each.first)
            gradient[rows, places] -= 1.0
            if each.slope is not None:
                gradient *= each.slope
            if self.scale != 1.0:
                gradient *= self.scale
            yield gradient


def _without_values(found: _Slice) -> _Slice:
    return _Slice(found.values[:, :0], found.first, None, found.largest, found.total)


def _those_within(values: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose place lies within the slice, and these places."""
    rows = ((places >= 0) & (places < values.shape[1])).nonzero().flatten()
    return rows, places[rows]


def _at(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """values[t, places[t]]; 0 where the place lies outside."""
    rows, inside = _those_within(values, places)
    return values.new_zeros(len(values)).index_put_((rows,), values[rows, inside])


class _SummedLoss(torch.autograd.Function):
    """Σ_i −log p(target_i); the gradient with respect to the hidden states is computed on the way."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, targets: torch.Tensor, head: OutputHead) -> torch.Tensor:  # type: ignore[no-untyped-def]
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in _even_slices(len(hidden), head.projection.most_tokens):
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


def _even_slices(count: int, most: int) -> Iterator[slice]:
    """As few slices as there can be of at most so many, about equal."""
    step = max(-(-count // max(-(-count // most), 1)), 1)
    return (slice(start, start + step) for start in range(0, count, step))


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


def plain_logits(causal: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits float32 [n, V] of hidden states [n, H] by the module that the model has, without a gradient."""
    module = causal.get_output_embeddings()
    with torch.no_grad():
        logits: torch.Tensor = module(hidden).to(torch.float32)
        OutputHead.of(causal, LocalHead(module)).finish(logits)
    return logits
