"""What a command computes: a training job, an evaluation."""

# ruff: noqa: RUF009 - the defaults are frozen, which ruff does not see across modules

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hetrain.config.adapter import LoraConfig
from hetrain.config.batching import BatchingConfig
from hetrain.config.data import DataConfig, TrainingDataConfig
from hetrain.config.fields import as_tuple, require, setting
from hetrain.config.outsourcing import OutsourcingConfig
from hetrain.config.training import TrainingConfig

LATEST = "latest"
DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What every computation over a data set needs: the rows, workers, a device, and what is outsourced."""

    dataset: tuple[str, ...] = field(
        metadata={
            "help": "Files or folders of rows (JSONL, JSON, CSV, Parquet, each text form also as .gz), - for "
            "standard input, or a data set's id on the hub.",
            "metavar": "DATASET...",
        }
    )
    data: DataConfig = DataConfig()
    workers: str | None = setting(
        None,
        "URL of the Redis or Valkey from which workers take tasks.",
        default="a broker and a worker on this machine, for this job",
    )
    device: str = setting("cpu", "torch device of the client's own layers.")
    outsourcing: OutsourcingConfig = OutsourcingConfig()

    def __post_init__(self) -> None:
        object.__setattr__(self, "dataset", as_tuple(self.dataset))
        require(bool(self.dataset), "dataset", "no data set is given", "name a file of rows")


@dataclass(frozen=True, kw_only=True)
class JobSpec(RunSpec):
    """A training job."""

    model: str = setting(DEFAULT_MODEL, "smollm2-135m, a Hugging Face directory, or a hub id.")
    output_dir: Path = setting(Path("out"), "Directory of adapter, metrics and checkpoints.")
    overwrite_output_dir: bool = setting(False, "Replace the adapter and checkpoints of another run.")
    resume_from_checkpoint: str | None = setting(
        None,
        "Go on from a checkpoint: its directory, or latest for that of the most updates in `output_dir`. "
        "Give the same data set and settings.",
        metavar=f"DIR|{LATEST}",
    )
    init_from: Path | None = setting(
        None,
        "Start from this PEFT LoRA adapter of the same model, with the same rank, alpha and modules, instead "
        "of a fresh one. A run that goes on from a checkpoint has its adapter from there.",
        default="a fresh adapter",
        metavar="ADAPTER",
    )
    data: TrainingDataConfig = TrainingDataConfig()
    lora: LoraConfig = LoraConfig()
    training: TrainingConfig = TrainingConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.training.evaluates or self.data.holds_out,
            "eval_strategy",
            "no rows are held out",
            "give `eval_dataset` or `validation_split`",
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationSpec(RunSpec):
    """An evaluation of a base model, with or without an adapter."""

    adapter: Path | None = setting(
        None,
        "Output directory of a training job, or another PEFT LoRA adapter.",
        default="the base model alone",
    )
    model: str | None = setting(
        None,
        "smollm2-135m, a Hugging Face directory, or a hub id.",
        default=f"the adapter's base model, or {DEFAULT_MODEL}",
    )
    batching: BatchingConfig = BatchingConfig()
