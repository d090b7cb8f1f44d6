"""Embeddings and output head in the precision in which their checkpoint stores them, computed in float32.

The two are most of what the client holds of a model. Their stored values, bf16 as a rule, stay in the
memory-mapped file, and become float32, which is exact, a few rows at a time.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn
from transformers import PreTrainedModel

from hetrain.nn.memory.bfloat16 import add_product, halves, has_bfloat16_tiles

_ROWS = 4096


class StoredEmbedding(nn.Embedding):
    """An `nn.Embedding` that returns float32 whatever the type of its weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Rows of the weight."""
        return super().forward(input).to(torch.float32)


class StoredHead(nn.Linear):
    """A frozen `nn.Linear` that computes in float32 whatever the type of its weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x·Wᵀ + bias."""
        y: torch.Tensor = _ProductByRows.apply(input, self.weight)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y.add_(self.bias)


class _ProductByRows(torch.autograd.Function):
    """x·Wᵀ, with few rows of W in float32 at any time; dx = dy·W.

    Where the processor has tiles for bfloat16, weights of that type stay as they are, and x and dy become two
    values each of that type (17 bits). The result is no view: autograd would copy the gradient of a view that
    has been written to.
    """

    @staticmethod
    def forward(ctx, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        x = input.reshape(-1, input.shape[-1])
        ctx.weight, ctx.shape = weight.detach(), input.shape
        ctx.has_tiles = _suit_tiles(x, weight)
        y = x.new_empty(*input.shape[:-1], len(weight))
        blocks = zip(y.view(-1, len(weight)).split(_ROWS, dim=1), ctx.weight.split(_ROWS), strict=True)
        if ctx.has_tiles:
            high, low = halves(x.contiguous())
            for columns, rows in blocks:
                add_product(columns, high, rows.t(), keep=False)
                add_product(columns, low, rows.t())
        else:
            for columns, rows in blocks:
                torch.mm(x, rows.to(x.dtype).t(), out=columns)
        return y

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[no-untyped-def]
        dy = dy.reshape(-1, dy.shape[-1])
        dx = dy.new_zeros(len(dy), ctx.weight.shape[1])
        for columns, rows in zip(dy.split(_ROWS, dim=1), ctx.weight.split(_ROWS), strict=True):
            if ctx.has_tiles:
                for half in halves(columns):
                    add_product(dx, half, rows)
            else:
                dx.addmm_(columns, rows.to(dy.dtype))
        return dx.view(ctx.shape), None


def _suit_tiles(x: torch.Tensor, weight: torch.Tensor) -> bool:
    types = (x.dtype, weight.dtype) == (torch.float32, torch.bfloat16)
    return types and x.device.type == "cpu" and has_bfloat16_tiles()


def keep_as_stored(causal: PreTrainedModel) -> None:
    """Has the model's embedding and output head hold their weights as stored.

    Where either, or a module that shares its weight, is of another class, that weight is left alone.
    """
    owners: dict[int, list[nn.Module]] = defaultdict(list)
    for module in causal.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(module)
    for module in (causal.get_input_embeddings(), causal.get_output_embeddings()):
        weight = getattr(module, "weight", None)
        if all(type(owner) in _STORED for owner in owners[id(weight)]):
            for owner in owners.pop(id(weight), []):
                # The same modules, so that ties, names and hooks stay.
                owner.__class__ = _STORED[type(owner)]


def is_stored(module: nn.Module) -> bool:
    """Whether the module takes a weight of any floating-point type."""
    return isinstance(module, StoredEmbedding | StoredHead)


_STORED: dict[type[nn.Module], type[nn.Module]] = {nn.Embedding: StoredEmbedding, nn.Linear: StoredHead}
