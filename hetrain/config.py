"""Every setting of hetrain, once: its name, type, default, meaning and the values that make sense.

The options of the command line and ``docs/reference/options.md`` are made from these fields. Texts name
another setting in backticks, which the command line replaces by its option.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from hetrain.public.errors import UsageError

T = TypeVar("T")

ALL_LINEAR = "all-linear"
LATEST = "latest"
DEFAULT_MODEL = "smollm2-135m"

# Those of transformers' schedules that need nothing but warm-up and the number of updates.
_SCHEDULES = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
_SCHEDULES += ["inverse_sqrt"]


def _setting(value: T, text: str, /, **more: Any) -> T:
    """A field with its default and help text.

    Args:
        value: the default.
        text: the help text.
        more: `default`, what None stands for; `metavar`, how a value is written; `least`, the smallest value.
    """
    return field(default=value, metadata={"help": text, **more})


def _require(holds: bool, name: str, problem: str, hint: str = "") -> None:
    if not holds:
        raise UsageError(problem, field=name, hint=hint)


def _require_least(config: Any) -> None:
    for each in fields(config):
        value, least = getattr(config, each.name), each.metadata.get("least")
        _require(least is None or value is None or value >= least, each.name, f"{value} is less than {least}")


def _names(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA (arXiv 2106.09685): y += dropout(x)·Aᵀ·Bᵀ·(alpha/r) on every target module.

    Raises:
        UsageError: a value makes no sense; `field` names it.
    """

    r: int = _setting(16, "Rank of the adapter.", least=1)
    alpha: int = _setting(32, "The adapter counts alpha/r times.", least=1)
    dropout: float = _setting(0.0, "Dropout before the adapter.")
    target_modules: tuple[str, ...] = _setting(
        (ALL_LINEAR,),
        "Module name suffixes as peft takes them, comma-separated or repeated; all-linear: all linears of "
        "the decoder blocks, outsourced or not.",
        metavar="NAMES",
    )

    def __post_init__(self) -> None:
        given = ",".join(_names(self.target_modules)).split(",")
        object.__setattr__(self, "target_modules", tuple(name.strip() for name in given if name.strip()))
        _require_least(self)
        _require(0 <= self.dropout < 1, "dropout", f"{self.dropout} does not lie in [0, 1)")
        _require(bool(self.target_modules), "target_modules", "no module is named", f"use {ALL_LINEAR}")


@dataclass(frozen=True, kw_only=True)
class OutsourcingConfig:
    """Which products workers compute, and how operands and results are encrypted."""

    engine: str = _setting(
        "rlwe", "rlwe encrypts; concrete too, exactly but slowly; clear hides nothing (for tests)."
    )
    activation_bits: int | None = _setting(
        None,
        "Most bits of an encrypted value, 2 to 24 (concrete: to 12).",
        default="as many as fit; concrete: 8",
    )
    verify_rows: int = _setting(
        16,
        "Secret rows by which each result is verified before it is decrypted, 8 to 64: a wrong one passes "
        "with probability 2^-N. The engine concrete takes 40 at least.",
    )
    outsource: tuple[str, ...] = _setting(
        ("*",),
        "Glob on full module names, as in 'model.layers.*.mlp.*', repeatable: only matching linears of the "
        "decoder blocks go to workers, the others run on the client, with adapters all the same.",
        metavar="PATTERN",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "outsource", _names(self.outsource))
        _require(8 <= self.verify_rows <= 64, "verify_rows", f"{self.verify_rows} does not lie in 8..64")


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """How rows become micro-batches, and how many of these are computed at once.

    Raises:
        UsageError: a value makes no sense; `field` names it.
    """

    max_length: int = _setting(1024, "Longest row in tokens; longer ones are cut.")
    micro_batch_tokens: int = _setting(
        2048, "Tokens per micro-batch, packed from whole rows without padding; 2048 fill the largest ring."
    )
    in_flight: int = _setting(2, "Micro-batches under way at once.", least=1)
    max_bytes_in_flight: int | None = _setting(
        None,
        "The most that operands and expected results may take in the broker at once, e.g. 500MB or 2GiB. A "
        "single product larger than the limit you gave is refused. Give it where jobs share a broker.",
        default="half of the broker's maxmemory, or 1 GiB where it has none",
        metavar="SIZE",
        least=1,
    )

    def __post_init__(self) -> None:
        _require(
            2 <= self.max_length <= self.micro_batch_tokens,
            "max_length",
            f"rows of up to {self.max_length} tokens do not fit micro-batches of {self.micro_batch_tokens}",
            "it must lie between 2 and `micro_batch_tokens`",
        )
        _require_least(self)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(BatchingConfig):
    """How to train: names and meanings of transformers' `TrainingArguments` where these have them.

    AdamW with a schedule of transformers. Steps, epochs, warm-up and the schedule count optimizer updates.

    Asynchronous (default): a micro-batch's gradients are applied as soon as they are complete, so that others
    may have moved the adapter since its snapshot, at most `staleness_bound` of them (`train/staleness.py`).
    With the default bound a slow micro-batch may take about four times as long as the others before a replica
    idles. `sync`: `in_flight` micro-batches share a snapshot and form one update, whatever their order.

    Raises:
        UsageError: a value makes no sense; `field` names it.
    """

    max_steps: int = _setting(
        -1,
        "Optimizer updates; overrides the epochs when positive. One micro-batch makes an update, with `sync` "
        "`in_flight` of them do.",
    )
    num_train_epochs: int = _setting(3, "Passes over the data set.")
    learning_rate: float = _setting(2e-4, "Peak learning rate of AdamW.")
    lr_scheduler_type: str = _setting("linear", f"Schedule over the updates: {', '.join(_SCHEDULES)}.")
    warmup_steps: int = _setting(0, "Updates of linear warm-up.", least=0)
    weight_decay: float = _setting(0.0, "Weight decay of AdamW.", least=0)
    max_grad_norm: float = _setting(1.0, "Clip gradients to this norm; 0 does not clip.", least=0)
    max_skipped_updates: int = _setting(
        5,
        "An update whose loss or gradients are not finite is skipped; after so many in a row the job ends, "
        "with a checkpoint.",
        least=1,
    )
    seed: int = _setting(42, "Of adapter, shuffling and dropout; never of keys or noise.")
    sync: bool = _setting(
        False, "Lock step: the micro-batches in flight share one snapshot of the adapter and make one update."
    )
    max_staleness: int | None = _setting(
        None,
        "The most updates between a micro-batch's snapshot of the adapter and its own update; results that "
        "would break it for a slower one wait. Less than `in_flight` − 1 leaves only N + 1 micro-batches in "
        "flight; 0: one at a time.",
        default="2·(in_flight − 1)",
        least=0,
    )
    save_steps: int = _setting(
        50, "Updates between checkpoints; 0 writes one only when the run is stopped or fails.", least=0
    )
    save_total_limit: int = _setting(2, "Checkpoints that are kept, the newest ones; 0 keeps all.", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            self.num_train_epochs >= 1 or self.max_steps >= 1,
            "num_train_epochs",
            "there is nothing to do",
            "set it or `max_steps` to 1 or more",
        )
        _require(self.learning_rate > 0, "learning_rate", f"{self.learning_rate} is not positive")
        known, name = self.lr_scheduler_type in _SCHEDULES, self.lr_scheduler_type
        _require(known, "lr_scheduler_type", f"unknown schedule {name!r}", f"one of: {', '.join(_SCHEDULES)}")

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


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What every computation over a data set needs: the rows, workers, a device, and what is outsourced."""

    dataset: Path = field(metadata={"help": "JSONL rows: text, prompt+completion, or messages."})
    workers: str | None = _setting(
        None,
        "URL of the Redis or Valkey from which workers take tasks.",
        default="a broker and a worker on this machine, for this job",
    )
    device: str = _setting("cpu", "torch device of the client's own layers.")
    outsourcing: OutsourcingConfig = OutsourcingConfig()


@dataclass(frozen=True, kw_only=True)
class JobSpec(RunSpec):
    """A training job."""

    model: str = _setting(DEFAULT_MODEL, "smollm2-135m, a Hugging Face directory, or a hub id.")
    output_dir: Path = _setting(  # noqa: RUF009
        Path("out"), "Directory of adapter, metrics and checkpoints."
    )
    overwrite_output_dir: bool = _setting(False, "Replace the adapter and checkpoints of another run.")
    resume_from_checkpoint: str | None = _setting(
        None,
        "Go on from a checkpoint: its directory, or latest for that of the most updates in `output_dir`. "
        "Give the same data set and settings.",
        metavar=f"DIR|{LATEST}",
    )
    lora: LoraConfig = LoraConfig()
    training: TrainingConfig = TrainingConfig()


@dataclass(frozen=True, kw_only=True)
class EvaluationSpec(RunSpec):
    """An evaluation of a base model, with or without an adapter."""

    adapter: Path | None = _setting(  # noqa: RUF009
        None,
        "Output directory of a training job, or another PEFT LoRA adapter.",
        default="the base model alone",
    )
    model: str | None = _setting(
        None,
        "smollm2-135m, a Hugging Face directory, or a hub id.",
        default=f"the adapter's base model, or {DEFAULT_MODEL}",
    )
    batching: BatchingConfig = BatchingConfig()
