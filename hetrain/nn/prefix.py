"""The frozen prefix: decoder blocks below the lowest adapter, whose output for a row never changes.

It is computed when a row is seen first, and kept. A micro-batch of rows that are all kept starts at the
lowest block with an adapter: nothing below it is sent to workers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hetrain.nn.attention import first_of_each
from hetrain.nn.families import decoder_blocks
from hetrain.nn.memory.encrypted_file import EncryptedFile, Extent

_IN_MEMORY = 256 << 20


class PrefixStore:
    """States of rows, by the rows' numbers. Thread-safe.

    In memory up to `limit` bytes, then in an `EncryptedFile`.

    Args:
        limit: bytes in memory.

    Attributes:
        in_tuples: whether blocks of this model give their states in a tuple.
    """

    def __init__(self, limit: int = _IN_MEMORY) -> None:
        self.in_tuples = False
        self._limit, self._lock = limit, threading.Lock()
        self._held: dict[int, torch.Tensor] = {}
        self._held_bytes = 0
        self._places: dict[int, tuple[Extent, torch.dtype]] = {}
        self._end = 0
        self._file = EncryptedFile()

    def has(self, rows: Sequence[int]) -> bool:
        """Whether the states of all `rows` are kept."""
        with self._lock:
            return all(row in self._held or row in self._places for row in rows)

    def keep(self, row: int, states: torch.Tensor) -> None:
        """Keeps states [t, hidden] of a row, if there is room: in float16 where that can hold them."""
        half = states.to("cpu", torch.float16, copy=True)
        kept = half if bool(half.isfinite().all()) else states.cpu().clone()
        size = kept.numel() * kept.element_size()
        with self._lock:
            if row in self._held or row in self._places:
                return
            if self._held_bytes + size <= self._limit:
                self._held[row], self._held_bytes = kept, self._held_bytes + size
                return
            with suppress(OSError):  # on a full disk it is computed anew
                extent = self._file.write(kept.numpy().data.cast("B"), self._end)
                self._places[row], self._end = (extent, kept.dtype), self._end + size

    def get(self, row: int, width: int) -> torch.Tensor:
        """The states [t, width] of a row that is kept, float32. Raises `StorageError`: the disk lost them."""
        with self._lock:
            held = self._held.get(row)
            if held is not None:
                return held.float()
            extent, dtype = self._places[row]
        stored = bytearray(extent.size)
        self._file.read(extent, memoryview(stored))
        return torch.frombuffer(stored, dtype=dtype).view(-1, width).float()


class FrozenPrefix:
    """The blocks of one replica below its lowest adapter, computed or passed over. Not thread-safe."""

    def __init__(self, causal: PreTrainedModel, store: PrefixStore) -> None:
        self._store = store
        self._blocks = _blocks_below_adapters(causal)
        self._rows: tuple[int, ...] = ()
        self._places: tuple[torch.Tensor, ...] = ()
        self._is_kept = False
        for index, block in enumerate(self._blocks):
            is_last = index == len(self._blocks) - 1
            block.forward = _passing(block.forward, self._last if is_last else self._other)

    def start(self, rows: Sequence[int], places: Sequence[torch.Tensor]) -> None:
        """Says which rows the next forward pass has, and which tokens each; none: it keeps nothing."""
        self._rows, self._places = tuple(rows) if self._blocks else (), tuple(places)
        self._is_kept = bool(rows) and self._store.has(rows)

    def _other(self, states: torch.Tensor, compute: Callable[[], Any]) -> Any:
        return states if self._is_kept else compute()

    def _last(self, states: torch.Tensor, compute: Callable[[], Any]) -> Any:
        if self._is_kept:
            whole_rows = torch.cat([self._store.get(row, states.shape[-1]) for row in self._rows])
            kept = whole_rows[first_of_each(self._places)][None].to(states)
            return (kept,) if self._store.in_tuples else kept
        output = compute()
        self._store.in_tuples = isinstance(output, tuple)
        if self._rows:
            computed = output[0] if self._store.in_tuples else output
            for row, places in zip(self._rows, self._places, strict=True):
                self._store.keep(row, computed[0].detach()[places])
        return output


def _passing(
    forward: Callable[..., Any], decide: Callable[[torch.Tensor, Callable[[], Any]], Any]
) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        states = arguments[0] if arguments else named["hidden_states"]
        return decide(states, lambda: forward(*arguments, **named))

    return call


def _blocks_below_adapters(causal: PreTrainedModel) -> list[nn.Module]:
    """The first blocks, up to the lowest that has something to train."""
    below: list[nn.Module] = []
    for _, block in decoder_blocks(causal):
        if any(parameter.requires_grad for parameter in block.parameters()):
            return below
        below.append(block)
    return []
