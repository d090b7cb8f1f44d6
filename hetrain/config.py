"""Every setting of hetrain, once: its name, type, default, meaning and the values that make sense.

The options of the command line and ``docs/reference/options.md`` are made from these fields. Texts name
another setting in backticks, which the command line replaces by its option.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from hetrain.public.errors import UsageError
from hetrain.public.quantities import parse_bits_per_second

T = TypeVar("T")

ALL_LINEAR = "all-linear"
LATEST = "latest"
AUTO = "auto"
MEASURED = "measured"
DEFAULT_MODEL = "smollm2-135m"

# Those of transformers' schedules that need nothing but warm-up and the number of updates.
_SCHEDULES = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
_SCHEDULES += ["inverse_sqrt"]
_CORRECTIONS = ["prediction", "none"]
_MAX_LENGTH = 1024
_MOST_LAYERS = 10_000
FEW_UPDATES = 50
"""With fewer of them staleness is known to cost much (docs/asynchronous.md)."""


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


def _require_known(name: str, value: str, known: Iterable[str]) -> None:
    _require(value in known, name, f"{value!r} is not known", f"one of: {', '.join(known)}")


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

    layers: str | None = _setting(
        None,
        "Decoder layers that get adapters, counted from 0, as in 8-15 or 0,4,8-11. Below the lowest, nothing "
        "is computed backward, and forward once for each row.",
        default="all",
        metavar="NUMBERS",
    )

    @property
    def layer_numbers(self) -> tuple[int, ...] | None:
        """The numbers in `layers`, in ascending order; None for all.

        Raises:
            UsageError: it is no list of numbers and ranges.
        """
        if self.layers is None:
            return None
        ranges = [re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip()) for part in self.layers.split(",")]
        numbers: set[int] = set()
        for match in ranges:
            _require(
                match is not None, "layers", f"{self.layers!r} are no numbers", "write 8-15, or 0,4,8-11"
            )
            assert match is not None
            first, last = int(match[1]), int(match[2] or match[1])
            _require(first <= last, "layers", f"{match[0]} ends before it begins")
            _require(last < _MOST_LAYERS, "layers", f"{last} is no layer of a model")
            numbers.update(range(first, last + 1))
        return tuple(sorted(numbers))

    def __post_init__(self) -> None:
        given = ",".join(_names(self.target_modules)).split(",")
        object.__setattr__(self, "target_modules", tuple(name.strip() for name in given if name.strip()))
        _require_least(self)
        _require(0 <= self.dropout < 1, "dropout", f"{self.dropout} does not lie in [0, 1)")
        _require(bool(self.target_modules), "target_modules", "no module is named", f"use {ALL_LINEAR}")
        _ = self.layer_numbers


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
        "decoder blocks go to workers, the others run on the client, with adapters all the same. "
        "`hetrain plan` also takes auto: what pays at its link.",
        metavar="PATTERN",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "outsource", _names(self.outsource))
        _require(
            AUTO not in self.outsource,
            "outsource",
            f"{AUTO} is no pattern of a job",
            "`hetrain plan` with auto and `link` prints the patterns to give",
        )
        _require(8 <= self.verify_rows <= 64, "verify_rows", f"{self.verify_rows} does not lie in 8..64")


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """How rows become micro-batches, and how many of these are computed at once.

    Raises:
        UsageError: a value makes no sense; `field` names it.
    """

    max_length: int | None = _setting(
        None,
        "Longest row in tokens; longer ones are cut.",
        default="1024, or a whole micro-batch where that is shorter",
        least=2,
    )
    micro_batch_tokens: int = _setting(
        2048,
        "The most tokens of a micro-batch, packed from whole rows without padding; 2048 fill the "
        "largest ring.",
        least=2,
    )
    in_flight: int = _setting(2, "The most micro-batches under way at once.", least=1)
    max_bytes_in_flight: int | None = _setting(
        None,
        "The most that operands and expected results may take in the broker at once, e.g. 500MB or 2GiB. A "
        "single product larger than the limit you gave is refused. Give it where jobs share a broker.",
        default="half of the broker's maxmemory, or 1 GiB where it has none",
        metavar="SIZE",
        least=1,
    )

    def __post_init__(self) -> None:
        _require_least(self)
        longest, room = self.longest_row, self.tokens_per_micro_batch
        _require(
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

    batch_tokens: int = _setting(
        4096,
        "The most tokens of one update, divided into equal micro-batches of at most `micro_batch_tokens`.",
        least=2,
    )
    max_steps: int = _setting(-1, "Optimizer updates; overrides the epochs when positive.")
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
    max_staleness: int = _setting(
        0,
        "The most updates between the adapter that a micro-batch starts from and its own update. 0 is lock "
        "step: an update starts when the one before it is made. N lets N more overlap with it after "
        "`warmup_steps`, which keeps distant workers busy and may learn worse.",
        least=0,
    )
    staleness_correction: str = _setting(
        "prediction",
        "What makes up for staleness. prediction: a micro-batch starts from the adapter as AdamW's moments "
        "expect it to be by its own update (XPipe, arXiv 1911.04610); none: from the adapter as it is.",
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
        _require_known("lr_scheduler_type", self.lr_scheduler_type, _SCHEDULES)
        _require_known("staleness_correction", self.staleness_correction, _CORRECTIONS)

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


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """What a job over a link is compared with: the same training on this machine.

    Raises:
        UsageError: a value makes no sense; `field` names it.
    """

    link: str | None = _setting(
        None,
        "Compare the job over this link with training on this machine. Bits per second each way between "
        "client and broker, as 100mbit or 2.5gbit; measured: send and fetch some MB over the broker of "
        "`workers`.",
        metavar=f"RATE|{MEASURED}",
    )
    round_trip_ms: float | None = _setting(
        None,
        "Milliseconds of a round trip between client and broker.",
        default=f"0, or what `link` {MEASURED} finds",
        least=0,
    )
    worker_speed: float = _setting(
        990.0,
        "int8 operations per second of all workers together, in 10^12; a weight and a token take 12 in "
        "training. The default assumes one H100 at half of its data sheet; two cores with AVX-512 reach 1.7.",
    )
    egress_price: float = _setting(
        # AWS, EC2 on demand, data transfer out to the Internet, first 10 TB a month, us-east-1:
        # https://aws.amazon.com/ec2/pricing/on-demand/
        0.09,
        "USD for a GB that leaves the workers' side for the client. The default is a list price of AWS.",
        least=0,
    )
    client_memory: int | None = _setting(
        None,
        "Memory that the client, or local training, may take, e.g. 8GB.",
        default="what this machine has free",
        metavar="SIZE",
        least=1,
    )
    probe: bool | None = _setting(
        None,
        "Measure this machine for about 20 seconds: a block of the model trained locally, the client's own "
        "layers, and its encryption. Without, nothing is said about times on this machine.",
        default="with `link`",
    )

    @property
    def bits_per_s(self) -> float | None:
        """The rate that `link` gives; None where there is none or it is to be measured."""
        if self.link is None or self.link == MEASURED:
            return None
        return parse_bits_per_second(self.link, field="link")

    @property
    def probes(self) -> bool:
        """Whether to measure this machine."""
        return self.link is not None if self.probe is None else self.probe

    def __post_init__(self) -> None:
        _require_least(self)
        _ = self.bits_per_s
        _require(self.worker_speed > 0, "worker_speed", f"{self.worker_speed} is not positive")
        needs_link = bool(self.probe) and self.link is None
        _require(not needs_link, "probe", "there is nothing to compare with", "give `link` too")


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
