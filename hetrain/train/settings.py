"""What a run is told: a few small frozen objects, checked when built."""

from __future__ import annotations

from dataclasses import dataclass

from hetrain.public.errors import UsageError

# Those of transformers' schedules that need nothing but warm-up and the number of updates.
_SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, a schedule of transformers, and gradient clipping. Counted in optimizer updates."""

    learning_rate: float = 2e-4
    schedule: str = "linear"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise UsageError(f"{self.learning_rate} is not positive", where="--learning-rate")
        if self.warmup_steps < 0 or self.max_grad_norm < 0:
            raise UsageError("must not be negative", where="--warmup-steps, --max-grad-norm")
        if self.schedule not in _SCHEDULES:
            raise UsageError(
                f"unknown schedule {self.schedule!r}",
                where="--lr-scheduler-type",
                hint=f"one of: {', '.join(_SCHEDULES)}",
            )


@dataclass(frozen=True)
class BatchSettings:
    """How rows become micro-batches and how many pass over the data there are.

    `max_steps` counts optimizer updates and, when positive, overrides `epochs`.
    """

    micro_batch_tokens: int = 2048
    max_length: int = 1024
    epochs: int = 3
    max_steps: int = -1
    seed: int = 42

    def __post_init__(self) -> None:
        if not 2 <= self.max_length <= self.micro_batch_tokens:
            raise UsageError(
                f"rows of up to {self.max_length} tokens do not fit micro-batches of "
                f"{self.micro_batch_tokens}",
                where="--max-length, --micro-batch-tokens",
                hint="--max-length must lie between 2 and --micro-batch-tokens",
            )
        if self.epochs < 1 and self.max_steps < 1:
            raise UsageError(
                "nothing to do", where="--num-train-epochs, --max-steps", hint="set one of them to 1 or more"
            )


@dataclass(frozen=True)
class OutsourcingSettings:
    """What leaves for the workers, and how it is hidden.

    `patterns` are globs on names of linears; what matches none stays with the client, in clear.
    `activation_bits` limits the precision of activations and gradients; None is the engine's own choice.
    `hints` keeps products with masks on disk, so that workers compute them once per job; None decides by the
    number of micro-batches and the room on disk.
    """

    engine: str = "rlwe"
    activation_bits: int | None = None
    patterns: tuple[str, ...] = ("*",)
    hints: bool | None = None


@dataclass(frozen=True)
class FlightSettings:
    """How many micro-batches run at once, and whether updates wait for all of them.

    Asynchronous (default): a micro-batch's gradients are applied as soon as they are complete, so others may
    have moved the adapter since it took its snapshot. No more than `staleness_bound` of them: results that
    would make a slower one too stale wait for it (see `schedule`). The staleness is logged with every one.
    `sync`: ``in_flight`` micro-batches share a snapshot and form one update, whatever order they finish in.

    `max_staleness` None is ``2·(in_flight − 1)``: while the others keep flying, as many results again may
    wait for a slow one, which may take about four times as long as they do before a replica idles. Less than
    ``in_flight − 1`` leaves only ``max_staleness + 1`` micro-batches in flight.
    `max_bytes_in_flight` limits what of this job lies in the broker; None takes a share of its memory.
    """

    in_flight: int = 2
    sync: bool = False
    max_staleness: int | None = None
    max_bytes_in_flight: int | None = None

    def __post_init__(self) -> None:
        if self.in_flight < 1:
            raise UsageError(
                f"{self.in_flight} micro-batches in flight make no progress", where="--in-flight"
            )
        if self.max_staleness is not None and self.max_staleness < 0:
            raise UsageError(
                f"{self.max_staleness} is negative",
                where="--max-staleness",
                hint="0 runs one micro-batch at a time",
            )
        if self.max_bytes_in_flight is not None and self.max_bytes_in_flight < 1:
            raise UsageError("nothing could travel", where="--max-bytes-in-flight")

    @property
    def batches_per_update(self) -> int:
        """Micro-batches whose gradients one update adds up."""
        return self.in_flight if self.sync else 1

    @property
    def staleness_bound(self) -> int:
        """The most updates between a micro-batch's snapshot and its own update."""
        if self.sync:
            return 0
        return 2 * (self.in_flight - 1) if self.max_staleness is None else self.max_staleness


@dataclass(frozen=True)
class CheckpointSettings:
    """How often a checkpoint is written, in optimizer updates (0: only when a run is stopped or fails), and
    how many are kept (0: all)."""

    save_steps: int = 50
    save_total_limit: int = 2

    def __post_init__(self) -> None:
        if self.save_steps < 0 or self.save_total_limit < 0:
            raise UsageError("must not be negative", where="--save-steps, --save-total-limit")
