"""Checkpoints: the state from which a stopped run goes on as if it had not been stopped.

``checkpoint-<step>/`` in the output directory holds

    adapter_model.safetensors, adapter_config.json   a PEFT adapter, as in the output directory itself
    optimizer.safetensors                            AdamW's moments and counts, by parameter
    trainer_state.json                               a `TrainerState`
    SHA256SUMS                                       of all of them, as ``sha256sum --check`` reads it

No pickle. A checkpoint appears whole under its name or not at all, and its sums are checked before it is
used. It holds no keys: every ciphertext has its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hetrain.config import LATEST
from hetrain.data.tokenization import Row
from hetrain.public.disk import os_errors
from hetrain.public.errors import UsageError
from hetrain.public.protocol.messages import printable
from hetrain.train.early_stopping import EvaluationState
from hetrain.train.updater import Tensors, Updater

_log = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_model.safetensors"
STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
SUMS_FILE = "SHA256SUMS"
_NEEDED = {ADAPTER_FILE, STATE_FILE, OPTIMIZER_FILE}
_SUM = re.compile(r"([0-9a-f]{64})  ([^/\n]+)\n")
_NAME = re.compile(r"checkpoint-(\d+)")

Identity = Mapping[str, Any]
"""What two runs must have in common for one to go on where the other stopped: keys and JSON values."""

_IN_WORDS = {
    "dataset_sha256": "the data set (the SHA-256 of its tokens)",
    "plan_sha256": "the plan (its SHA-256)",
}  # keys that are no settings


class TrainerState(BaseModel):
    """The state of a run, without its tensors.

    Attributes:
        format: version of this layout.
        identity: what a run that goes on from here must have in common with this one.
        step: updates so far,
        skipped_updates: those of them that were skipped, since values were not finite,
        micro_batches: and the micro-batches that made them: the position in the data.
        total_steps: updates that the run was to make.
        tokens: tokens of applied micro-batches.
        elapsed_s: seconds of training.
        schedule: state of the learning rate's schedule.
        evaluations: what evaluations during training have shown.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    format: Literal[5] = 5
    identity: dict[str, Any]
    step: int = Field(ge=1)
    skipped_updates: int = Field(ge=0)
    micro_batches: int = Field(ge=1)
    total_steps: int = Field(ge=1)
    tokens: int = Field(ge=0)
    elapsed_s: float = Field(ge=0)
    schedule: dict[str, Any]
    evaluations: EvaluationState = EvaluationState()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, its state read and checked."""

    path: Path
    state: TrainerState

    def require(self, identity: Identity) -> None:
        """Raises `UsageError` unless a run of this `identity` may go on from here."""
        was, now = self.state.identity, json.loads(json.dumps(dict(identity)))
        differing = sorted(name for name in now if name not in was or was[name] != now[name])
        if differing:
            differences = "; ".join(
                f"{_IN_WORDS.get(name, f'`{name}`')} was {printable(was.get(name))}, is {now[name]}"
                for name in differing
            )
            raise UsageError(
                f"the checkpoint belongs to another run: {differences}",
                where=str(self.path),
                hint="give the model, data set and settings that it was made with, or start anew without "
                "`resume_from_checkpoint`",
            )

    def restore(self, updater: Updater) -> None:
        """Puts adapter, optimizer and schedule back. Raises `UsageError` where they do not fit."""
        try:
            values = read_adapter(self.path, updater.snapshot().values)
            moments = load_file(self.path / OPTIMIZER_FILE)
            updater.restore(values, moments, dict(self.state.schedule), self.state.step)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise _unreadable(self.path, error) from error


def read_adapter(directory: Path, names: Iterable[str]) -> Tensors:
    """An adapter's values by its parameters' names. Raises `OSError`, `KeyError` or `SafetensorError`."""
    saved = load_file(directory / ADAPTER_FILE)
    # peft leaves the adapter's own name out of its files.
    return {name: saved[name.replace(".default.", ".")] for name in names}


def rows_digest(rows: Sequence[Row]) -> str:
    """SHA-256 of the tokens and targets of all rows, that is of the data set under this model's tokenizer."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row.tokens).to_bytes(8, "little"))
        digest.update(np.array(row.tokens, "<i8").tobytes())
        digest.update(bytes(row.supervised))
    return digest.hexdigest()


def find_checkpoint(wanted: str, output_dir: Path) -> Checkpoint:
    """The checkpoint that `wanted` names: a directory, or ``latest`` for that of the most updates.

    A broken one is passed over for the one before it, with a warning.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    if wanted != LATEST:
        return _read(Path(wanted))
    steps = checkpoint_steps(output_dir)
    if not steps:
        raise UsageError(
            "there is no checkpoint", where=str(output_dir), hint="start without `resume_from_checkpoint`"
        )
    for step in reversed(steps[1:]):
        try:
            return _read(checkpoint_path(output_dir, step))
        except UsageError as error:
            _log.warning("%s: %s; the run goes on from the one before it", error.where, error.what)
    return _read(checkpoint_path(output_dir, steps[0]))


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """The path of the checkpoint after `step` updates."""
    return output_dir / f"checkpoint-{step}"


def checkpoint_steps(output_dir: Path) -> list[int]:
    """The checkpoints there, by their updates, in ascending order."""
    if not output_dir.is_dir():
        return []
    matches = [_NAME.fullmatch(path.name) for path in output_dir.iterdir() if path.is_dir()]
    return sorted(int(match[1]) for match in matches if match)


def write_checkpoint(
    output_dir: Path, state: TrainerState, optimizer: Tensors, write_adapter: Callable[[Path], None]
) -> None:
    """Writes a checkpoint, which appears under its name when it is complete and on disk, in place of another.

    Args:
        output_dir: the run's directory.
        state: the run's state.
        optimizer: its optimizer's state.
        write_adapter: writes the adapter's files into a directory.

    Raises:
        OSError: it cannot be written; no part of it remains.
    """
    target = checkpoint_path(output_dir, state.step)
    scratch = output_dir / f".{target.name}.new"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(0o700)
    try:
        with os_errors():
            write_adapter(scratch)
            save_file(dict(optimizer), scratch / OPTIMIZER_FILE)
        (scratch / STATE_FILE).write_text(state.model_dump_json(indent=2) + "\n", encoding="utf-8")
        _write_sums(scratch)
        for path in (*scratch.iterdir(), scratch):
            _sync(path)
        replaced = _set_aside(target) if target.exists() else None  # written before, but not followed up
        scratch.rename(target)
        _sync(output_dir)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def remove_checkpoint(output_dir: Path, step: int) -> None:
    """Removes a checkpoint. No part of it is ever visible under its name."""
    shutil.rmtree(_set_aside(checkpoint_path(output_dir, step)), ignore_errors=True)


def _set_aside(path: Path) -> Path:
    stale = path.with_name(f".{path.name}.old")
    shutil.rmtree(stale, ignore_errors=True)
    path.rename(stale)
    return stale


def _write_sums(directory: Path) -> None:
    lines = [f"{_sum_of(path)}  {path.name}\n" for path in sorted(directory.iterdir())]
    (directory / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def _require_sums(directory: Path) -> None:
    """Raises `ValueError` unless all files are there as they were written."""
    if not (directory / SUMS_FILE).is_file():
        raise ValueError(f"it has no {SUMS_FILE}: it is incomplete, or of another version")
    lines = (directory / SUMS_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    sums = {match[2]: match[1] for match in map(_SUM.fullmatch, lines) if match}
    if len(sums) != len(lines) or not sums.keys() >= _NEEDED:
        raise ValueError(f"{SUMS_FILE} is damaged")
    for name, expected in sums.items():
        if not (directory / name).is_file():
            raise ValueError(f"{name} is missing")
        if _sum_of(directory / name) != expected:
            raise ValueError(f"{name} is damaged")


def _sum_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> Checkpoint:
    if not path.is_dir() or not ((path / STATE_FILE).exists() or _NAME.fullmatch(path.name)):
        raise UsageError(
            "there is no checkpoint", where=str(path), hint=f"give a directory checkpoint-N, or {LATEST}"
        )
    try:
        _require_sums(path)
        return Checkpoint(path, TrainerState.model_validate_json((path / STATE_FILE).read_bytes()))
    except (OSError, ValueError) as error:  # pydantic's are ValueErrors
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UsageError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        reason = f"{STATE_FILE}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
    return UsageError(
        f"the checkpoint cannot be used: {reason}", where=str(path), hint="name an earlier one, or start anew"
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
