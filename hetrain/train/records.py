"""What a run leaves behind: metrics.jsonl, job.json, a PEFT directory. Files appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import torch
from peft import PeftModel

from hetrain.public.errors import UsageError
from hetrain.train.loop import Applied
from hetrain.train.step import StepResult

ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class MicroBatchRecord:
    """A line of metrics.jsonl: one micro-batch.

    `loss` is the mean over its supervised tokens; `staleness` counts the updates between its snapshot and its
    own; times are seconds of this micro-batch: `wait_s` from the first byte sent to the last received,
    `server_s` the worker's computing within it; `devices` is what workers say they computed on.
    """

    step: int
    micro_batch: int
    loss: float
    tokens: int
    targets: int
    seconds: float
    bytes_up: int
    bytes_down: int
    encrypt_s: float
    wait_s: float
    decrypt_s: float
    server_s: float
    devices: tuple[str, ...]
    staleness: int
    learning_rate: float
    grad_norm: float
    elapsed_s: float


def records_of(applied: Applied, elapsed_s: float) -> list[MicroBatchRecord]:
    """One record per micro-batch of an update; `elapsed_s` since training began."""
    return [_record(applied, result, elapsed_s) for result in applied.results]


def _record(applied: Applied, result: StepResult, elapsed_s: float) -> MicroBatchRecord:
    update = applied.update
    return MicroBatchRecord(
        step=update.step,
        micro_batch=result.batch.index,
        loss=result.summed_loss / result.batch.n_targets,
        tokens=result.batch.n_tokens,
        targets=result.batch.n_targets,
        seconds=result.seconds,
        **asdict(result.meter),
        staleness=update.step - 1 - result.version,
        learning_rate=update.learning_rate,
        grad_norm=update.grad_norm,
        elapsed_s=elapsed_s,
    )


class OutputDirectory:
    """The directory of one run.

    Raises:
        UsageError: it cannot be written, or holds an adapter already and `overwrite` is false.
    """

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        self.path = path
        self._metrics: TextIO | None = (
            None  # opened by the first record: a run that never starts costs no data
        )
        if (path / ADAPTER_FILE).exists() and not overwrite:
            raise UsageError(
                "there is an adapter already",
                where=str(path),
                hint="choose another --output-dir, or pass --overwrite-output-dir",
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot be written: {error.strerror}", where=str(path)) from error

    @property
    def log_file(self) -> Path:
        """Where an embedded broker and worker write."""
        return self.path / "worker.log"

    def add(self, record: MicroBatchRecord) -> None:
        """Appends a line to metrics.jsonl."""
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("w", encoding="utf-8")
        self._metrics.write(json.dumps(asdict(record)) + "\n")
        self._metrics.flush()

    def write_job(self, job: Mapping[str, object]) -> None:
        """Replaces job.json."""
        scratch = self.path / ".job.json.new"
        scratch.write_text(json.dumps(job, indent=2, default=str) + "\n", encoding="utf-8")
        scratch.replace(self.path / "job.json")

    def save_adapter(self, model: PeftModel, values: Mapping[str, torch.Tensor], base_reference: str) -> None:
        """Writes the adapter as stock peft reads it, `values` being the trained parameters by name."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in values:
                    parameter.copy_(values[name])
        for config in model.peft_config.values():
            config.base_model_name_or_path = base_reference
            config.inference_mode = True
        scratch = Path(tempfile.mkdtemp(prefix=".adapter-", dir=self.path))
        try:
            model.save_pretrained(str(scratch))
            for file in sorted(scratch.iterdir(), key=lambda file: file.name == ADAPTER_FILE):
                os.replace(file, self.path / file.name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def close(self) -> None:
        """Closes metrics.jsonl."""
        if self._metrics is not None:
            self._metrics.close()
