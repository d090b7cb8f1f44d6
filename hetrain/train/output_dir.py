"""What a run leaves behind: metrics.jsonl, job.json, a PEFT directory. Files appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from hetrain.public.errors import UsageError
from hetrain.train.checkpoint import ADAPTER_FILE, checkpoint_steps, remove_checkpoint
from hetrain.train.loop import AppliedUpdate
from hetrain.train.step import StepResult


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


def records_of(applied: AppliedUpdate, elapsed_s: float) -> list[MicroBatchRecord]:
    """One record per micro-batch of an update; `elapsed_s` since training began."""
    return [_record(applied, result, elapsed_s) for result in applied.results]


def _record(applied: AppliedUpdate, result: StepResult, elapsed_s: float) -> MicroBatchRecord:
    update = applied.update
    return MicroBatchRecord(
        step=update.step,
        micro_batch=result.batch.index,
        loss=result.summed_loss / result.batch.n_targets,
        tokens=result.batch.n_tokens,
        targets=result.batch.n_targets,
        seconds=result.seconds,
        **asdict(result.stats),
        staleness=update.step - 1 - result.version,
        learning_rate=update.learning_rate,
        grad_norm=update.grad_norm,
        elapsed_s=elapsed_s,
    )


class OutputDirectory:
    """The directory of one run.

    Args:
        path: where it is, or will be.
        overwrite: whether what another run left there may be replaced.
        keep: the run goes on from a checkpoint in this very directory, after this many updates: what was
            written up to then stays. None for a run that starts anew.

    Raises:
        UsageError: it cannot be written, or holds another run's adapter or checkpoints and `overwrite` is
            false.
    """

    def __init__(self, path: Path, *, overwrite: bool, keep: int | None = None) -> None:
        self.path = path
        self._keep = keep
        self._metrics: TextIO | None = None
        if keep is None and not overwrite:
            self._require_unused()
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
            self._metrics = self._begin()
        self._metrics.write(json.dumps(asdict(record)) + "\n")
        self._metrics.flush()

    def write_job(self, job: Mapping[str, object]) -> None:
        """Replaces job.json."""
        self._replace("job.json", json.dumps(job, indent=2, default=str) + "\n")

    def save_adapter(self, write: Callable[[Path], None]) -> None:
        """Puts the files that `write` writes to a directory into this one, the adapter itself last."""
        scratch = Path(tempfile.mkdtemp(prefix=".adapter-", dir=self.path))
        try:
            write(scratch)
            for file in sorted(scratch.iterdir(), key=lambda file: file.name == ADAPTER_FILE):
                os.replace(file, self.path / file.name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def close(self) -> None:
        """Closes metrics.jsonl."""
        if self._metrics is not None:
            self._metrics.close()

    def _require_unused(self) -> None:
        if (self.path / ADAPTER_FILE).exists():
            found, way = "an adapter", ""
        elif checkpoint_steps(self.path):
            found, way = "a checkpoint", "go on from it with --resume-from-checkpoint latest, "
        else:
            return
        raise UsageError(
            f"there is {found} already",
            where=str(self.path),
            hint=f"{way}choose another --output-dir, or pass --overwrite-output-dir",
        )

    def _begin(self) -> TextIO:
        """Removes what is not this run's. With the first record: a run that never starts costs no data."""
        for step in checkpoint_steps(self.path):
            if step > (self._keep or 0):
                remove_checkpoint(self.path, step)
        for leftover in self.path.glob(".checkpoint-*"):  # left by a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        metrics = self.path / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines() if self._keep and metrics.exists() else []
        kept = [
            line for line in lines if line.endswith("}") and json.loads(line)["step"] <= (self._keep or 0)
        ]
        self._replace(metrics.name, "".join(f"{line}\n" for line in kept))
        return metrics.open("a", encoding="utf-8")

    def _replace(self, name: str, text: str) -> None:
        scratch = self.path / f".{name}.new"
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(self.path / name)
