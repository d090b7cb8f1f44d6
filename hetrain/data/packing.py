"""Packs rows into micro-batches: whole rows, end to end, with no slot spent on padding.

One token occupies one slot of a ciphertext, so a fuller micro-batch is cheaper per token. Rows that share a
micro-batch share nothing else: positions restart at each row, no target crosses a row's end, and ``lengths``
gives attention the rows' bounds.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hetrain.data.tokenization import Row
from hetrain.public.errors import DatasetError

IGNORE_INDEX = -100
"""Target of a position whose prediction does not count, as `torch.nn.functional.cross_entropy` has it."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """T tokens of one or more whole rows.

    Attributes:
        index: running number within the run, from 0.
        tokens: int64 [T], token ids.
        positions: int64 [T], position of each token in its row, from 0.
        targets: int64 [T], the token that each position must predict, which is the next one of its row, or
            `IGNORE_INDEX` where that one is not supervised or the row ends.
        lengths: tokens of each row, in order; their sum is T.
        rows: the rows' places in the data set, in the same order.
    """

    index: int
    tokens: Tensor
    positions: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """T, the tokens of all rows."""
        return len(self.tokens)

    @property
    def n_targets(self) -> int:
        """Positions that count in the loss, at least one."""
        return int((self.targets != IGNORE_INDEX).sum())


def pack(rows: Sequence[Row], max_tokens: int, order: Iterable[int]) -> list[tuple[int, ...]]:
    """Distributes rows over micro-batches by first fit.

    Each row, in the given order, goes into the earliest micro-batch with room for it, or opens a new one.

    Args:
        rows: the data set.
        max_tokens: tokens per micro-batch, at most.
        order: indices into ``rows``.

    Returns:
        The indices of each micro-batch's rows. The same arguments always give the same result.

    Raises:
        DatasetError: a row has more than ``max_tokens`` tokens.
    """
    _require_fit(rows, max_tokens)
    chosen = list(order)
    bins: list[list[int]] = []
    # A binary tree over the micro-batches that may be needed: each node holds the most room below it, so the
    # earliest one with enough room takes log(n) steps to find. A plain scan is quadratic in all, every epoch.
    leaves = 1 << max(len(chosen) - 1, 0).bit_length()
    room = [max_tokens] * (2 * leaves)
    for index in chosen:
        length = len(rows[index].tokens)
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(index)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [tuple(members) for members in bins]


def micro_batches(rows: Sequence[Row], packed: Iterable[Sequence[int]]) -> Iterator[MicroBatch]:
    """Builds the micro-batches that `pack` laid out, numbered from 0."""
    for index, members in enumerate(packed):
        yield _micro_batch(index, tuple(members), [rows[member] for member in members])


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
    layouts = (_pack_epoch(rows, max_tokens, seed, epoch, rows_per_batch) for epoch in numbers)
    return micro_batches(rows, itertools.chain.from_iterable(layouts))


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
    numbers = itertools.count()
    return (len(_pack_epoch(rows, max_tokens, seed, epoch, rows_per_batch)) for epoch in numbers)


def _pack_epoch(
    rows: Sequence[Row], max_tokens: int, seed: int, epoch: int, rows_per_batch: int | None
) -> list[tuple[int, ...]]:
    order = list(range(len(rows)))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    if rows_per_batch is None:
        return pack(rows, max_tokens, order)
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


def _micro_batch(index: int, places: tuple[int, ...], rows: Sequence[Row]) -> MicroBatch:
    lengths = tuple(len(row.tokens) for row in rows)
    targets = [target for row in rows for target in _targets(row)]
    return MicroBatch(
        index=index,
        tokens=torch.tensor([token for row in rows for token in row.tokens], dtype=torch.long),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        targets=torch.tensor(targets, dtype=torch.long),
        lengths=lengths,
        rows=places,
    )


def _targets(row: Row) -> list[int]:
    following = zip(row.tokens[1:], row.supervised[1:], strict=True)
    return [token if counts else IGNORE_INDEX for token, counts in following] + [IGNORE_INDEX]
