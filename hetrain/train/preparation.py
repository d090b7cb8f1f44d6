"""Making a model's hints ahead of time, so that its first job starts at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hetrain.config import OutsourcingConfig
from hetrain.secret.engines.rlwe.hints import client_hints, hint_bytes_of
from hetrain.train.hints import OnPrepare, ignore_progress
from hetrain.train.session import open_base, open_session


@dataclass(frozen=True)
class Preparation:
    """A model's hints: how many there are, how many were made now, their bytes, and where they lie."""

    hints: int
    made: int
    nbytes: int
    directory: Path

    def __str__(self) -> str:
        size = f"{self.nbytes / 1e9:.2f} GB"
        return f"{self.hints} hints, {self.made} of them made now, {size} in {self.directory}"


def prepare(
    model: str, workers: str | None, outsource: Sequence[str], on_prepare: OnPrepare = ignore_progress
) -> Preparation:
    """Has workers compute the hints of a model that the cache lacks. Raises `HetrainError`."""
    made = 0

    def count(done: int, total: int) -> None:
        nonlocal made
        made = done
        on_prepare(done, total)

    config = OutsourcingConfig(outsource=tuple(outsource))
    with open_session(open_base(model), config, workers, "cpu", on_prepare=count) as session:
        plan = session.split.plan
    return Preparation(2 * len(plan.groups), made, hint_bytes_of(plan), client_hints().directory)
