"""A row as its file has it, and rows that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hetrain.public.errors import DatasetError

_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Record:
    """Columns of one row. `number` counts from 1: lines of a text file, rows of a columnar one."""

    columns: dict[str, Any]
    source: str
    number: int

    @property
    def where(self) -> str:
        """``rows.jsonl:4``."""
        return f"{self.source}:{self.number}"


def present(columns: dict[str, Any]) -> dict[str, Any]:
    """A row of a columnar file without nulls: every object there has the fields of all others."""
    return {name: _without_nulls(value) for name, value in columns.items() if value is not None}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return present(value)
    # A null that stands in a list was put there: no field of another object explains it.
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


Item = Record | DatasetError
"""What a reader yields: a row, or why there is none at that place."""


@dataclass
class Problems:
    """Rows that cannot be used: the first ten are kept, the others counted."""

    first: list[DatasetError] = field(default_factory=list)
    count: int = 0

    def add(self, error: DatasetError) -> None:
        """Takes one more."""
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(error)

    def raise_any(self) -> None:
        """Raises `DatasetError` for all of them, if there are any."""
        if not self.count:
            return
        first = self.first[0]
        if self.count == 1:
            raise first
        lines = [f"{error.where}: {error.what}" for error in self.first]
        if more := self.count - len(self.first):
            lines.append(f"and {more:,} more")
        shown = "\n  ".join(lines)
        raise DatasetError(f"{self.count:,} rows cannot be used:\n  {shown}", hint=first.hint) from first
