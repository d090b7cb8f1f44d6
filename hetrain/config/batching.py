"""How rows become micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from hetrain.config.fields import require, require_least, setting

MAX_LENGTH = 1024
"""The longest row in tokens, where a micro-batch takes as much."""


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """How rows become micro-batches, and how many of these are computed at once.

    Raises:
        UsageError: a value makes no sense; `field` names it.
    """

    max_length: int | None = setting(
        None,
        "Longest row in tokens; longer ones are cut.",
        default="1024, or a whole micro-batch where that is shorter",
        least=2,
    )
    micro_batch_tokens: int = setting(
        2048,
        "The most tokens of a micro-batch, packed from whole rows without padding; 2048 fill the "
        "largest ring.",
        least=2,
    )
    in_flight: int = setting(2, "The most micro-batches under way at once.", least=1)
    max_bytes_in_flight: int | None = setting(
        None,
        "The most that operands and expected results may take in the broker at once, e.g. 500MB or 2GiB. A "
        "single product larger than the limit you gave is refused. Give it where jobs share a broker.",
        default="half of the broker's maxmemory, or 1 GiB where it has none",
        metavar="SIZE",
        least=1,
    )

    def __post_init__(self) -> None:
        require_least(self)
        longest, room = self.longest_row, self.tokens_per_micro_batch
        require(
            longest <= room,
            "max_length",
            f"rows of up to {longest} tokens do not fit micro-batches of {room}",
            "lower it, or raise `micro_batch_tokens` and, in training, `batch_tokens`",
        )

    @property
    def tokens_per_micro_batch(self) -> int:
        """The most tokens that one is packed with."""
        return self.micro_batch_tokens

    @property
    def evaluation_tokens(self) -> int:
        """The most tokens of a micro-batch of an evaluation."""
        return self.tokens_per_micro_batch

    @property
    def longest_row(self) -> int:
        """Tokens to which longer rows are cut."""
        return self.max_length or min(MAX_LENGTH, self.tokens_per_micro_batch)
