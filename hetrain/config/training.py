"""How to train: the optimizer, what an update takes, and when to evaluate, to save and to end."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hetrain.config.batching import MAX_LENGTH, BatchingConfig
from hetrain.config.fields import as_tuple, require, require_known, setting

# Those of transformers' schedules that need nothing but warm-up and the number of updates.
_SCHEDULES = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
_SCHEDULES += ["inverse_sqrt"]
_CORRECTIONS = ["prediction", "none"]
_EVAL_STRATEGIES = ["no", "steps", "epoch"]
_TRACKERS = ["none", "tensorboard", "wandb"]
_BATCH_TOKENS = 4096
_EVAL_STEPS = 50
FEW_UPDATES = 50
"""With fewer of them staleness is known to cost much (docs/asynchronous.md)."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(BatchingConfig):
    """How to train: names and meanings of transformers' `TrainingArguments` where these have them.

    AdamW with a schedule of transformers. Steps, epochs, warm-up and the schedule count optimizer updates. An
    update adds up the gradients of its micro-batches, which are under way together and may end in any order.

    Raises:
        UsageError: a value makes no sense; `field` names it.
    """

    batch_tokens: int | None = setting(
        None,
        "The most tokens of one update, divided into equal micro-batches of at most `micro_batch_tokens`.",
        default=f"{_BATCH_TOKENS}, or as `gradient_accumulation_steps` says",
        least=2,
    )
    gradient_accumulation_steps: int | None = setting(
        None,
        "Micro-batches of one update, instead of `batch_tokens`: it takes up to so many times "
        "`micro_batch_tokens`.",
        default="as `batch_tokens` says",
        least=1,
    )
    per_device_train_batch_size: int | None = setting(
        None,
        "Rows of a micro-batch, as TRL counts them without packing, instead of `micro_batch_tokens`. An "
        "update is `gradient_accumulation_steps` of them, by default one. Short rows do not fill rings.",
        default="as many as fit",
        least=1,
    )
    max_steps: int = setting(-1, "Optimizer updates instead of epochs; -1 counts epochs.")
    num_train_epochs: float = setting(3.0, "Passes over the data set; 0.5 trains on half of it.")
    activation_memory: int = setting(
        128 << 20,
        "Memory for activations that wait for a backward pass, of all micro-batches under way. What is more "
        "waits on the disk of HETRAIN_CACHE, encrypted under a key that is in memory alone.",
        default="128 MiB",
        metavar="SIZE",
        least=0,
    )
    learning_rate: float = setting(2e-4, "Peak learning rate of AdamW.")
    lr_scheduler_type: str = setting("linear", f"Schedule over the updates: {', '.join(_SCHEDULES)}.")
    warmup_steps: int = setting(0, "Updates of linear warm-up.", least=0)
    warmup_ratio: float = setting(
        0.0, "Part of all updates that is linear warm-up, instead of `warmup_steps`."
    )
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
    save_total_limit: int = setting(
        2, "Checkpoints that are kept, the newest ones and the best one; 0 keeps all.", least=0
    )
    eval_strategy: str = setting(
        "no",
        "When the rows that are held out are evaluated during training: steps, every `eval_steps` updates; "
        "epoch, after each pass; no. The finished adapter is evaluated on them in any case.",
    )
    eval_steps: int | None = setting(
        None,
        "Updates between evaluations, with `eval_strategy` steps.",
        default=str(_EVAL_STEPS),
        least=1,
    )
    early_stopping_patience: int | None = setting(
        None,
        "Training ends after so many evaluations in a row whose loss is not less than the best one before.",
        default="it does not",
        least=1,
    )
    early_stopping_threshold: float = setting(
        0.0,
        "By how much more a loss must be less than the best one, to count for `early_stopping_patience`.",
        least=0,
    )
    load_best_model_at_end: bool = setting(
        False,
        "The output is the adapter with the least held-out loss, whose checkpoint is kept, not the last one.",
    )
    report_to: tuple[str, ...] = setting(
        ("none",),
        "Where losses and rates are reported, beside metrics.jsonl: tensorboard (files in runs/ of "
        "`output_dir`), wandb, or none; comma-separated or repeated.",
        metavar="NAMES",
    )

    def __post_init__(self) -> None:
        names = ",".join(as_tuple(self.report_to)).split(",")
        object.__setattr__(self, "report_to", tuple(name.strip() for name in names if name.strip()))
        self._require_one_size()
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
        require(0 <= self.warmup_ratio < 1, "warmup_ratio", f"{self.warmup_ratio} does not lie in [0, 1)")
        require(
            not (self.warmup_ratio and self.warmup_steps),
            "warmup_ratio",
            "`warmup_steps` says how long warm-up is",
            "give one of the two",
        )
        self._require_evaluations()
        require(bool(self.report_to), "report_to", "nothing is named", "use none")
        for name in self.report_to:
            require_known("report_to", name, _TRACKERS)
        alone = "none" not in self.report_to or len(self.report_to) == 1
        require(alone, "report_to", "none stands beside another name", "leave out one of them")

    def _require_one_size(self) -> None:
        require(
            self.batch_tokens is None or self.per_device_train_batch_size is None,
            "per_device_train_batch_size",
            "`batch_tokens` says how much an update takes",
            "give `gradient_accumulation_steps` instead, or leave it out",
        )
        require(
            self.batch_tokens is None or self.gradient_accumulation_steps is None,
            "gradient_accumulation_steps",
            "`batch_tokens` says how much an update takes",
            "give one of the two: an update takes `micro_batch_tokens` times the steps",
        )

    def _require_evaluations(self) -> None:
        require_known("eval_strategy", self.eval_strategy, _EVAL_STRATEGIES)
        require(
            self.eval_steps is None or self.eval_strategy == "steps",
            "eval_steps",
            f"they mean nothing with `eval_strategy` {self.eval_strategy}",
            "give `eval_strategy` steps, or leave them out",
        )
        for name in ("early_stopping_patience", "load_best_model_at_end"):
            require(
                not getattr(self, name) or self.evaluates,
                name,
                "nothing is evaluated during training",
                "give `eval_strategy` steps or epoch",
            )
        require(
            not self.early_stopping_threshold or self.early_stopping_patience is not None,
            "early_stopping_threshold",
            "training does not end early",
            "give `early_stopping_patience` too",
        )

    @property
    def evaluates(self) -> bool:
        """Whether rows are evaluated during training."""
        return self.eval_strategy != "no"

    @property
    def updates_per_evaluation(self) -> int:
        """Updates between evaluations, with the strategy ``steps``."""
        return self.eval_steps or _EVAL_STEPS

    @property
    def tokens_per_update(self) -> int:
        """The most tokens of one update."""
        if self.per_device_train_batch_size is not None:
            return self.batches_per_update * self.tokens_per_micro_batch
        if self.gradient_accumulation_steps is not None:
            return self.gradient_accumulation_steps * self.micro_batch_tokens
        return self.batch_tokens or _BATCH_TOKENS

    @property
    def batches_per_update(self) -> int:
        """Micro-batches whose gradients one update adds up."""
        if self.per_device_train_batch_size is not None:
            return self.gradient_accumulation_steps or 1
        return -(-self.tokens_per_update // self.micro_batch_tokens)

    @property
    def tokens_per_micro_batch(self) -> int:
        """The most tokens that one is packed with."""
        if self.per_device_train_batch_size is not None:
            return self.per_device_train_batch_size * self.longest_row
        return -(-self.tokens_per_update // self.batches_per_update)

    @property
    def longest_row(self) -> int:
        """Tokens to which longer rows are cut."""
        if self.per_device_train_batch_size is not None:
            return self.max_length or MAX_LENGTH
        return super().longest_row

    @property
    def evaluation_tokens(self) -> int:
        """The most tokens of a micro-batch of an evaluation."""
        if self.per_device_train_batch_size is not None:
            return max(self.micro_batch_tokens, self.longest_row)
        return super().evaluation_tokens

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

    def over(self, updates: int) -> TrainingConfig:
        """The same for a training of so many updates: `warmup_ratio` has become `warmup_steps`."""
        if not self.warmup_ratio:
            return self
        return replace(self, warmup_steps=math.ceil(self.warmup_ratio * updates), warmup_ratio=0.0)

    def staleness_bound(self, update: int) -> int:
        """The most staleness of an update, counted from 0: none during warm-up."""
        return self.max_staleness if update >= self.warmup_steps else 0
