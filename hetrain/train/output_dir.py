"""The output directory of a run: adapter, metrics.jsonl, job.json. Files appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

from hetrain.public.errors import UsageError
from hetrain.train.checkpoint import ADAPTER_FILE, checkpoint_steps, remove_checkpoint
from hetrain.train.metrics import MicroBatchMetrics


class OutputDirectory:
    """The directory of one run.

    Args:
        path: the directory, which need not exist yet.
        overwrite: whether the files of another run may be replaced.
        keep: the update of the checkpoint in this directory from which the run goes on: what was written up
            to then stays. None for a run that starts anew.

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
        """The log of an embedded broker and worker."""
        return self.path / "worker.log"

    def add(self, metrics: MicroBatchMetrics) -> None:
        """Appends a line to metrics.jsonl."""
        if self._metrics is None:
            self._metrics = self._begin()
        self._metrics.write(json.dumps(metrics.record()) + "\n")
        self._metrics.flush()

    def write_job(self, job: Mapping[str, object]) -> None:
        """Replaces job.json."""
        self._replace("job.json", json.dumps(job, indent=2, default=str) + "\n")

    def write_card(self, text: str) -> None:
        """Replaces README.md, the adapter's model card."""
        self._replace("README.md", text)

    def save_adapter(self, write: Callable[[Path], None]) -> None:
        """Moves the files that `write` makes into this directory, the adapter's weights last."""
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
            found, resume = "an adapter", ""
        elif checkpoint_steps(self.path):
            found, resume = "a checkpoint", "go on from it with `resume_from_checkpoint` latest, "
        else:
            return
        raise UsageError(
            f"there is {found} already",
            where=str(self.path),
            hint=f"{resume}choose another `output_dir`, or set `overwrite_output_dir`",
        )

    def _begin(self) -> TextIO:
        """Removes other runs' files, with the first metrics: a run that never starts removes nothing."""
        for step in checkpoint_steps(self.path):
            if step > (self._keep or 0):
                remove_checkpoint(self.path, step)
        for leftover in self.path.glob(".checkpoint-*"):  # left by a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        if not self._keep:
            for name in ("evaluations.jsonl", "report.html"):
                (self.path / name).unlink(missing_ok=True)
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
