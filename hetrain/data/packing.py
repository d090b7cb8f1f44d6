"""Packs rows into micro-batches: whole rows, end to end, with no slot spent on padding.

One token occupies one slot of a ciphertext, so a fuller micro-batch is cheaper per token. Rows that share a
micro-batch share nothing else than the prompt that they begin with (`hetrain.data.shared_prompt`), which is
there once: positions restart at each row, no target crosses a row's end, and ``places`` gives attention the
tokens of each row.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hetrain.data.shared_prompt import shared_prompts
from hetrain.data.tokenization import Row
from hetrain.public.errors import DatasetError

IGNORE_INDEX = -100
"""Target of a position whose prediction does not count, as `torch.nn.functional.cross_entropy` has it."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One or more whole rows on T tokens: those of all rows, with a shared prompt once.

    Attributes:
        index: running number within the run, from 0.
        tokens: int64 [T], token ids.
        positions: int64 [T], position of each token in its row, from 0.
        places: for each row int64 [L], where its L tokens stand among the T.
        targets: int64 [Σ L], the token that each token of each row must predict, which is the next one of its
            row, or `IGNORE_INDEX` where that one is not supervised or the row ends.
        rows: the rows' places in the data set, in the same order.
    """

    index: int
    tokens: Tensor
    positions: Tensor
    places: tuple[Tensor, ...]
    targets: Tensor
    rows: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """T, the tokens that are computed."""
        return len(self.tokens)

    @property
    def n_targets(self) -> int:
        """Predictions that count in the loss, at least one."""
        return int((self.targets != IGNORE_INDEX).sum())

    @property
    def lengths(self) -> tuple[int, ...]:
        """The rows' lengths L, whose sum is more than T where they share a prompt."""
        return tuple(len(places) for places in self.places)


def pack(
    rows: Sequence[Row], max_tokens: int, order: Iterable[int], prompts: Sequence[int] | None = None
) -> list[tuple[int, ...]]:
    """Distributes rows over micro-batches by first fit.

    Each row, in the given order, goes into the earliest micro-batch with room for it, or opens a new one.
    Where the shared prompt is there already, it takes room for its other tokens only.

    Args:
        rows: the data set.
        max_tokens: tokens per micro-batch, at most.
        order: indices into ``rows``.
        prompts: of `shared_prompts`; None shares nothing.

    Returns:
        The indices of each micro-batch's rows. The same arguments always give the same result.

    Raises:
        DatasetError: a row has more than ``max_tokens`` tokens.
    """
    _require_fit(rows, max_tokens)
    chosen = list(order)
    bins: list[list[int]] = []
    room = _Room(len(chosen), max_tokens)
    room_beside_prompt = _Room(len(chosen), -1)
    for index in chosen:
        length, prompt = len(rows[index].tokens), prompts[index] if prompts else 0
        place = room.first(length)
        if prompt:
            place = min(place, room_beside_prompt.first(length - prompt))
        if place == len(bins):
            bins.append([])
        bins[place].append(index)
        has_prompt = room_beside_prompt[place] >= 0
        left = room[place] - length + (prompt if has_prompt else 0)
        room[place] = left
        if has_prompt or prompt:
            room_beside_prompt[place] = left
    return [tuple(members) for members in bins]


class _Room:
    """The room of each micro-batch, as a binary tree: each node holds the most room below it.

    So the earliest one with enough room takes log(n) steps to find. A plain scan is quadratic in all, every
    epoch.
    """

    def __init__(self, count: int, room: int) -> None:
        self._leaves = 1 << max(count - 1, 0).bit_length()
        self._most = [room] * (2 * self._leaves)

    def first(self, need: int) -> int:
        """The earliest micro-batch with that much room; beyond all if there is none."""
        node = 1
        if self._most[node] < need:
            return self._leaves
        while node < self._leaves:
            node *= 2
            if self._most[node] < need:
                node += 1
        return node - self._leaves

    def __getitem__(self, place: int) -> int:
        return self._most[place + self._leaves]

    def __setitem__(self, place: int, room: int) -> None:
        node, most = place + self._leaves, self._most
        most[node] = room
        while node > 1:
            node //= 2
            most[node] = max(most[2 * node], most[2 * node + 1])


def micro_batches(
    rows: Sequence[Row], packed: Iterable[Sequence[int]], prompts: Sequence[int] | None = None
) -> Iterator[MicroBatch]:
    """Builds the micro-batches that `pack` laid out with the same ``prompts``, numbered from 0."""
    for index, members in enumerate(packed):
        sizes = [prompts[member] if prompts else 0 for member in members]
        yield _micro_batch(index, tuple(members), [rows[member] for member in members], sizes)


def epochs(
    rows: Sequence[Row],
    max_tokens: int,
    seed: int,
    n_epochs: int | None,
    rows_per_batch: int | None = None,
) -> Iterator[MicroBatch]:
    """Yields the micro-batches of ``n_epochs`` passes over the rows, or of endless passes for None.

    Every epoch shuffles by ``(seed, epoch)`` alone and packs anew. The index runs on from epoch to epoch.

    Args:
        rows: the data set.
        max_tokens: tokens per micro-batch, at most.
        seed: of the order.
        n_epochs: passes.
        rows_per_batch: rows of a micro-batch, in the shuffled order, but for the last of an epoch; None packs
            as many as fit.

    Raises:
        DatasetError: at once, if there are no rows or one has more than ``max_tokens`` tokens.
    """
    _require_fit(rows, max_tokens)
    if not rows:
        raise DatasetError("there are no rows to pack", hint="Give at least one row")
    numbers = itertools.count() if n_epochs is None else range(n_epochs)
    prompts = shared_prompts(rows)
    layouts = (_pack_epoch(rows, max_tokens, seed, epoch, rows_per_batch, prompts) for epoch in numbers)
    return micro_batches(rows, itertools.chain.from_iterable(layouts), prompts)


def count_micro_batches(
    rows: Sequence[Row],
    max_tokens: int,
    seed: int,
    n_epochs: float,
    rows_per_batch: int | None = None,
) -> int:
    """Counts exactly what `epochs` yields for the same arguments, as epochs may differ by a few.

    Of a part of an epoch it counts that part of its micro-batches, rounded up.
    """
    counts = list(itertools.islice(epoch_sizes(rows, max_tokens, seed, rows_per_batch), math.ceil(n_epochs)))
    if part := n_epochs - math.floor(n_epochs):
        counts[-1] = math.ceil(part * counts[-1])
    return sum(counts)


def epoch_sizes(
    rows: Sequence[Row], max_tokens: int, seed: int, rows_per_batch: int | None = None
) -> Iterator[int]:
    """The number of micro-batches of each epoch, without end."""
    prompts = shared_prompts(rows)
    numbers = itertools.count()
    return (len(_pack_epoch(rows, max_tokens, seed, epoch, rows_per_batch, prompts)) for epoch in numbers)


def epoch_tokens(rows: Sequence[Row], max_tokens: int, seed: int, rows_per_batch: int | None = None) -> int:
    """The tokens that the first epoch computes: those of all rows, a shared prompt once a micro-batch."""
    prompts = shared_prompts(rows)
    packed = _pack_epoch(rows, max_tokens, seed, 0, rows_per_batch, prompts)
    sizes = ([prompts[member] for member in members] for members in packed)
    return sum(len(row.tokens) for row in rows) - sum(sum(each) - max(each) for each in sizes)


def _pack_epoch(
    rows: Sequence[Row],
    max_tokens: int,
    seed: int,
    epoch: int,
    rows_per_batch: int | None,
    prompts: Sequence[int],
) -> list[tuple[int, ...]]:
    order = list(range(len(rows)))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    if rows_per_batch is None:
        return pack(rows, max_tokens, order, prompts)
    starts = range(0, len(order), rows_per_batch)
    return [tuple(order[start : start + rows_per_batch]) for start in starts]


def _require_fit(rows: Sequence[Row], max_tokens: int) -> None:
    for row in rows:
        if len(row.tokens) > max_tokens:
            raise DatasetError(
                f"a row of {len(row.tokens)} tokens does not fit into a micro-batch of {max_tokens}",
                where=f"line {row.line} of the data set",
                hint="Lower the maximum length of a row, or allow more tokens per micro-batch",
            )


def _micro_batch(
    index: int, members: tuple[int, ...], rows: Sequence[Row], prompts: Sequence[int]
) -> MicroBatch:
    tokens: list[int] = []
    positions: list[int] = []
    places: list[Tensor] = []
    prompt = torch.empty(0, dtype=torch.long)
    for row, size in zip(rows, prompts, strict=True):
        shared = prompt[:size]
        own = range(len(shared), len(row.tokens))
        places.append(torch.cat([shared, torch.arange(len(tokens), len(tokens) + len(own))]))
        tokens += row.tokens[own.start :]
        positions += own
        if size:
            prompt = places[-1][:size]
    return MicroBatch(
        index=index,
        tokens=torch.tensor(tokens, dtype=torch.long),
        positions=torch.tensor(positions, dtype=torch.long),
        places=tuple(places),
        targets=torch.tensor([target for row in rows for target in _targets(row)], dtype=torch.long),
        rows=members,
    )


def _targets(row: Row) -> list[int]:
    following = zip(row.tokens[1:], row.supervised[1:], strict=True)
    return [token if counts else IGNORE_INDEX for token, counts in following] + [IGNORE_INDEX]
