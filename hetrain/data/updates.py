"""The updates of a training: how many there are, and what one consists of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hetrain.config import TrainingConfig
from hetrain.data.packing import count_micro_batches
from hetrain.data.tokenization import Row


def count_updates(rows: Sequence[Row], config: TrainingConfig) -> int:
    """Optimizer updates of a training on `rows`."""
    if config.max_steps > 0:
        return config.max_steps
    batches = count_micro_batches(rows, config.tokens_per_micro_batch, config.seed, config.num_train_epochs)
    return -(-batches // config.batches_per_update)


@dataclass(frozen=True)
class Course:
    """A training in figures.

    Attributes:
        rows: rows of the data set.
        epoch_tokens: their tokens.
        updates: optimizer updates.
        tokens: tokens of all of them, about.
    """

    rows: int
    epoch_tokens: int
    updates: int
    tokens: int

    @staticmethod
    def of(rows: Sequence[Row], config: TrainingConfig) -> Course:
        """The course of a training on `rows`."""
        epoch_tokens, updates = sum(len(row.tokens) for row in rows), count_updates(rows, config)
        whole_epochs = round(epoch_tokens * config.num_train_epochs)
        tokens = whole_epochs if config.max_steps <= 0 else updates * config.batch_tokens
        return Course(len(rows), epoch_tokens, updates, tokens)
