"""The updates of a training: how many there are, and what one consists of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

from hetrain.config import TrainingConfig
from hetrain.data.packing import MicroBatch, count_micro_batches, epoch_sizes, epoch_tokens, epochs
from hetrain.data.tokenization import Row


@dataclass(frozen=True)
class Position:
    """How far a training has come: updates that were made, and the micro-batches that made them."""

    updates: int = 0
    micro_batches: int = 0


_START = Position()


def count_updates(rows: Sequence[Row], config: TrainingConfig, start: Position = _START) -> int:
    """Optimizer updates of a training on `rows`, with those up to `start`.

    The last update of a run may have fewer micro-batches than others; a run that is extended goes on with
    the one that follows, so that none is left out.
    """
    if config.max_steps > 0:
        return config.max_steps
    size, at_once = config.tokens_per_micro_batch, config.per_device_train_batch_size
    batches = count_micro_batches(rows, size, config.seed, config.num_train_epochs, at_once)
    return start.updates + max(0, _updates_of(batches - start.micro_batches, config))


def draw(
    rows: Sequence[Row], config: TrainingConfig, total: int, start: Position = _START
) -> Iterator[MicroBatch]:
    """The micro-batches of a training of `total` updates that follow `start`."""
    n_epochs = None if config.max_steps > 0 else math.ceil(config.num_train_epochs)
    size, at_once = config.tokens_per_micro_batch, config.per_device_train_batch_size
    drawn = epochs(rows, size, config.seed, n_epochs, at_once)
    more = (total - start.updates) * config.batches_per_update
    return islice(drawn, start.micro_batches, start.micro_batches + more)


def epoch_ends(
    rows: Sequence[Row], config: TrainingConfig, total: int, start: Position = _START
) -> frozenset[int]:
    """The updates, from that of `start` up to `total`, that complete a pass over the rows."""
    ends = set()
    at_once = config.per_device_train_batch_size
    sizes = epoch_sizes(rows, config.tokens_per_micro_batch, config.seed, at_once)
    for batches in accumulate(sizes):
        update = start.updates + _updates_of(batches - start.micro_batches, config)
        if update > total:
            break
        if update >= start.updates:
            ends.add(update)
    return frozenset(ends)


def _updates_of(batches: int, config: TrainingConfig) -> int:
    return -(-batches // config.batches_per_update)


@dataclass(frozen=True)
class Course:
    """A training in figures.

    Attributes:
        rows: rows of the data set.
        row_tokens: their tokens.
        epoch_tokens: tokens that a pass computes: those of all rows, a shared prompt once a micro-batch.
        updates: optimizer updates.
        tokens: tokens that all of them compute, about.
    """

    rows: int
    row_tokens: int
    epoch_tokens: int
    updates: int
    tokens: int

    @staticmethod
    def of(rows: Sequence[Row], config: TrainingConfig) -> Course:
        """The course of a training on `rows`."""
        row_tokens, updates = sum(len(row.tokens) for row in rows), count_updates(rows, config)
        size, at_once = config.tokens_per_micro_batch, config.per_device_train_batch_size
        a_pass = epoch_tokens(rows, size, config.seed, at_once)
        whole_epochs = round(a_pass * config.num_train_epochs)
        tokens = whole_epochs if config.max_steps <= 0 else updates * config.tokens_per_update
        return Course(len(rows), row_tokens, a_pass, updates, tokens)
