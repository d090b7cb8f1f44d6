"""How rows become micro-batches and updates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hetrain.config.fields import require, require_known, require_least, setting

# Those of transformers' schedules that need nothing but warm-up and the number of updates.
_SCHEDULES = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
_SCHEDULES += ["inverse_sqrt"]
_CORRECTIONS = ["prediction", "none"]
_MAX_LENGTH = 1024
FEW_UPDATES = 50
"""With fewer of them staleness is known to cost much (docs/asynchronous.md)."""


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
    def longest_row(self) -> int:
        """Tokens to which longer rows are cut."""
        return self.max_length or min(_MAX_LENGTH, self.tokens_per_micro_batch)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(BatchingConfig):
    """How to train: names and meanings of transformers' `TrainingArguments` where these have them.

    AdamW with a schedule of transformers. Steps, epochs, warm-up and the schedule count optimizer updates. An
    update adds up the gradients of its micro-batches, which are under way together and may end in any order.

    Raises:
        UsageError: a value makes no sense; `field` names it.
    """

    batch_tokens: int = setting(
        4096,
        "The most tokens of one update, divided into equal micro-batches of at most `micro_batch_tokens`.",
        least=2,
    )
    max_steps: int = setting(-1, "Optimizer updates instead of epochs; -1 counts epochs.")
    num_train_epochs: float = setting(3.0, "Passes over the data set; 0.5 trains on half of it.")
    learning_rate: float = setting(2e-4, "Peak learning rate of AdamW.")
    lr_scheduler_type: str = setting("linear", f"Schedule over the updates: {', '.join(_SCHEDULES)}.")
    warmup_steps: int = setting(0, "Updates of linear warm-up.", least=0)
    weight_decay: float = setting(0.0, "Weight decay of AdamW.", least=0)
    max_grad_norm: float = setting(1.0, "Clip gradients to this norm; 0 does not clip.", least=0)
    max_skipped_updates: int = setting(
        5,
        "An update whose loss or gradients are not finite is skipped; after so many in a row the job ends, "
        "with a checkpoint.",
        least=1,
    )
    seed: int = setting(42, "Of adapter, shuffling and dropout; never of keys or noise.")
    max_staleness: int = setting(
        0,
        "The most updates between the adapter that a micro-batch starts from and its own update. 0 is lock "
        "step: an update starts when the one before it is made. N lets N more overlap with it after "
        "`warmup_steps`, which keeps distant workers busy and may learn worse.",
        least=0,
    )
    staleness_correction: str = setting(
        "prediction",
        "What makes up for staleness. prediction: a micro-batch starts from the adapter as AdamW's moments "
        "expect it to be by its own update (XPipe, arXiv 1911.04610); none: from the adapter as it is.",
    )
    save_steps: int = setting(
        50, "Updates between checkpoints; 0 writes one only when the run is stopped or fails.", least=0
    )
    save_total_limit: int = setting(2, "Checkpoints that are kept, the newest ones; 0 keeps all.", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.max_steps == -1 or self.max_steps >= 1,
            "max_steps",
            f"{self.max_steps} updates are none",
            "give 1 or more, or leave it out and give `num_train_epochs`",
        )
        enough = 0 < self.num_train_epochs < math.inf or self.max_steps >= 1
        require(
            enough, "num_train_epochs", f"{self.num_train_epochs} passes train nothing", "give more than 0"
        )
        require(self.learning_rate > 0, "learning_rate", f"{self.learning_rate} is not positive")
        require_known("lr_scheduler_type", self.lr_scheduler_type, _SCHEDULES)
        require_known("staleness_correction", self.staleness_correction, _CORRECTIONS)

    @property
    def batches_per_update(self) -> int:
        """Micro-batches whose gradients one update adds up."""
        return -(-self.batch_tokens // self.micro_batch_tokens)

    @property
    def tokens_per_micro_batch(self) -> int:
        """The most tokens that one is packed with."""
        return -(-self.batch_tokens // self.batches_per_update)

    @property
    def replicas(self) -> int:
        """Micro-batches that can be under way at once: no more than overlapping updates have."""
        return min(self.in_flight, self.batches_per_update * (1 + self.max_staleness))

    def warning(self, updates: int) -> str | None:
        """Why a training of so many updates learns worse than it could; None if it does not."""
        if self.max_staleness == 0 or updates >= FEW_UPDATES:
            return None
        return (
            f"{updates} updates with a staleness of up to {self.max_staleness} learn much less than in lock "
            f"step; with `max_staleness` 0, or {FEW_UPDATES} updates and more, little or nothing is lost"
        )

    def staleness_bound(self, update: int) -> int:
        """The most staleness of an update, counted from 0: none during warm-up."""
        return self.max_staleness if update >= self.warmup_steps else 0
