"""What a run has recorded in its output directory, read back: for the model card and the report."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetrain.jobs.files import JOB_FILE, METRICS_FILE
from hetrain.public.errors import UsageError
from hetrain.train.storage import append_whole

EVALUATIONS_FILE = "evaluations.jsonl"

Record = Mapping[str, Any]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecord:
    """A run's records. Keys that an older version did not write are missing.

    Attributes:
        directory: where they lie.
        job: job.json.
        micro_batches: the lines of metrics.jsonl.
        evaluations: the lines of evaluations.jsonl: evaluations of this adapter, with `step` and `dataset`.
    """

    directory: Path
    job: Record
    micro_batches: tuple[Record, ...]
    evaluations: tuple[Record, ...]

    def total(self, key: str) -> float:
        """The sum over the micro-batches that have a value."""
        return sum(record.get(key) or 0 for record in self.micro_batches)

    def names(self, key: str) -> list[str]:
        """Every name in a list or mapping of the micro-batches, sorted."""
        return sorted({name for record in self.micro_batches for name in record.get(key) or ()})


def read_run(directory: Path) -> RunRecord:
    """The records in a run's output directory.

    Raises:
        UsageError: there is no job.json, or a file cannot be read.
    """
    try:
        job = dict(json.loads((directory / JOB_FILE).read_bytes()))
        return RunRecord(
            directory,
            job,
            tuple(_lines(directory / METRICS_FILE)),
            tuple(_lines(directory / EVALUATIONS_FILE)),
        )
    except FileNotFoundError as error:
        raise UsageError(
            f"there is no {Path(error.filename).name}",
            where=str(directory),
            hint="give the output directory of a training job",
        ) from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"the run's records cannot be read: {error}", where=str(directory)) from error


def add_evaluation(
    adapter: Path, names: Sequence[str], figures: Mapping[str, object], step: int | None = None
) -> None:
    """Appends to evaluations.jsonl of the run that made `adapter`; does nothing for an adapter of elsewhere.

    That it cannot be written is a warning: the evaluation is done.

    Args:
        adapter: output directory or checkpoint of the run.
        names: of the data set.
        figures: what came out.
        step: the adapter's update; None: as the run's records say.
    """
    is_checkpoint = adapter.name.startswith("checkpoint-")
    directory = _run_directory(adapter)
    if not (directory / JOB_FILE).is_file():
        return
    try:
        job = json.loads((directory / JOB_FILE).read_bytes())
        if step is None:
            last = job.get("adapter_step", job.get("steps"))
            step = int(adapter.name.rpartition("-")[2]) if is_checkpoint else last
        dataset = [str(Path(name).resolve()) if Path(name).is_file() else name for name in names]
        _append_line(directory / EVALUATIONS_FILE, json.dumps({"step": step, "dataset": dataset, **figures}))
    except (OSError, ValueError) as error:
        _log.warning("the evaluation could not be recorded: %s", error)


def last_evaluated(adapter: Path) -> tuple[Path, Record] | None:
    """The file of rows of the last recorded evaluation of an adapter or checkpoint that is still there.

    With the settings that they were read with, as of `DataConfig`; none where they are the training job's.
    """
    for line in reversed(_lines(_run_directory(adapter) / EVALUATIONS_FILE)):
        names, data = line.get("dataset"), line.get("data") or {}
        match names:
            case [str(name)] if isinstance(data, dict) and os.path.isfile(name):
                return Path(name), data
    return None


def dataset_label(record: Record) -> str:
    """What a reader calls the data set of a job or an evaluation: the last parts of its names."""
    return ", ".join(Path(name).name for name in record.get("dataset") or ())


def _run_directory(adapter: Path) -> Path:
    return adapter.resolve().parent if adapter.name.startswith("checkpoint-") else adapter


def _append_line(path: Path, line: str) -> None:
    """Raises `OSError`; no part of the line is then there."""
    with path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        start = "" if file.read(1) in (b"", b"\n") else "\n"  # whoever wrote half a line was killed
        append_whole(file.fileno(), f"{start}{line}\n".encode())


def _lines(path: Path) -> list[Record]:
    """The records in a file, which may not exist, without lines that were written in part."""
    if not path.exists():
        return []
    records: list[Record] = []
    for line in path.read_text("utf-8", "replace").splitlines():
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            _log.warning("%s: a damaged line is passed over", path)
    return records
