"""Attention over several rows packed into one sequence of tokens: no row sees what is another's alone.

Registered with transformers as an attention implementation. `packed_rows` says how the tokens divide into
rows, because not every architecture passes unknown arguments on to its attention. Rows of similar length are
gathered into one batch, padded inside attention only; with causal attention and padding at the end no valid
token attends to padding. A token that several rows share is gathered into each of them, and gives the same in
all: that of one is kept.
The cost is Σ L² over rows instead of (Σ L)².
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

from hetrain.public.errors import UnsupportedArchitecture

IMPLEMENTATION = "hetrain_rows"


@dataclass(frozen=True)
class _Bucket:
    """Rows of similar length: `gather` [rows·longest] token of each padded place, `valid` the places kept."""

    rows: int
    longest: int
    gather: torch.Tensor
    valid: torch.Tensor


@dataclass(frozen=True)
class RowLayout:
    """How the T tokens of a micro-batch divide into rows."""

    buckets: tuple[_Bucket, ...]
    inverse: torch.Tensor
    """int64 [T]: where token t first stands in the concatenation of all buckets' valid places."""

    @staticmethod
    def of(places: Sequence[torch.Tensor], device: torch.device | str = "cpu") -> RowLayout:
        """Groups rows whose lengths share a power of two, so at most half of a batch is padding.

        Args:
            places: for each row int64 [L], which of the T tokens are its own, in order. Rows may share their
                first ones.
            device: where attention is computed.
        """
        by_size: dict[int, list[torch.Tensor]] = defaultdict(list)
        for row in places:
            by_size[len(row).bit_length()].append(row)
        buckets, order = [], []
        for members in by_size.values():
            size = torch.tensor([len(row) for row in members])
            # Padding repeats token 0: finite values, and its results are dropped.
            gather = pad_sequence(members, batch_first=True)
            longest = gather.shape[1]
            valid = (torch.arange(longest) < size[:, None]).flatten().nonzero().flatten()
            gather = gather.flatten()
            buckets.append(_Bucket(len(members), longest, gather.to(device), valid.to(device)))
            order.append(gather[valid])
        return RowLayout(tuple(buckets), first_of_each(order).to(device))


def first_of_each(places: Sequence[torch.Tensor]) -> torch.Tensor:
    """int64 [T]: where in the concatenation of `places` each of the T tokens stands first."""
    return torch.from_numpy(np.unique(torch.cat(list(places)).numpy(), return_index=True)[1])


def end_to_end(lengths: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """The places of rows that share nothing."""
    places: tuple[torch.Tensor, ...] = torch.arange(sum(lengths)).split(list(lengths))
    return places


OnAttention = Callable[[], object]


def _ignore() -> None: ...


_LAYOUT: ContextVar[tuple[RowLayout, OnAttention] | None] = ContextVar("row layout", default=None)


@contextmanager
def packed_rows(layout: RowLayout, on_attention: OnAttention = _ignore) -> Iterator[None]:
    """Within this context, and this thread, `row_attention` keeps the rows of `layout` apart.

    `on_attention` is called each time that it is.
    """
    token = _LAYOUT.set((layout, on_attention))
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def row_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """softmax(Q·Kᵀ·scaling)·V within each row, causal.

    Args:
        module: the attention module; named in errors.
        query: [1, heads, T, head dimension]; `key`, `value` may have fewer heads (grouped queries).
        attention_mask: ignored; `packed_rows` says all.
        scaling: defaults to 1/√(head dimension).
        sliding_window: a token sees at most that many tokens, itself included.
        softcap: scores s become softcap·tanh(s/softcap) (Gemma 2).
        s_aux: attention sinks, which are not supported.

    Returns:
        [1, T, heads, head dimension] and no weights.

    Raises:
        UnsupportedArchitecture: the attention has sinks or looks ahead.
    """
    current = _LAYOUT.get()
    if current is None:
        raise RuntimeError("row_attention runs within packed_rows only")
    layout, on_attention = current
    if s_aux is not None:
        raise UnsupportedArchitecture("attention sinks are not supported", where=type(module).__name__)
    if not getattr(module, "is_causal", True):
        raise UnsupportedArchitecture(
            "this attention is not causal", where=type(module).__name__, hint="only decoders can be split"
        )
    module.row_attention_seen = True  # type: ignore[assignment]  # torch declares modules and tensors alone
    on_attention()
    pieces = []
    for bucket in layout.buckets:
        q, k, v = (_batch(tensor, bucket) for tensor in (query, key, value))
        out = _causal(q, k, v, scaling, sliding_window, softcap)
        pieces.append(out.transpose(1, 2).flatten(0, 1).index_select(0, bucket.valid))
    return torch.cat(pieces).index_select(0, layout.inverse)[None], None


def _batch(tensor: torch.Tensor, bucket: _Bucket) -> torch.Tensor:
    """[1, heads, T, d] -> [rows, heads, longest, d]."""
    heads, width = tensor.shape[1], tensor.shape[3]
    gathered = tensor[0].index_select(1, bucket.gather)
    return gathered.view(heads, bucket.rows, bucket.longest, width).transpose(0, 1)


def _causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    reach = length if window is None else min(window, length)
    if reach == length and softcap is None:
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1
        )
    place = torch.arange(length, device=query.device)
    distance = place[:, None] - place
    mask = (distance >= 0) & (distance < reach)
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=groups > 1
        )
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value


AttentionInterface.register(IMPLEMENTATION, row_attention)
