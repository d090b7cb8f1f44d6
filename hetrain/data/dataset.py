"""The rows of a job as they were written: read and checked in whole, not yet tokenized."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hetrain.config import DataConfig, JobSpec
from hetrain.data.records import Item, Problems
from hetrain.data.schema import (
    FORM_NAMES,
    Checked,
    Conversation,
    Form,
    InstructionForm,
    MessagePair,
    StringPair,
    TextForm,
    check_record,
)
from hetrain.data.sources import HubSplit, read_sources
from hetrain.public.errors import DatasetError, UsageError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RawRow:
    """A checked row, not yet tokenized; ``line`` counts from 1 in its source."""

    content: Form
    source: str
    line: int

    @property
    def where(self) -> str:
        """``rows.jsonl:4``."""
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class JobRows:
    """Rows to learn, and rows that the finished adapter is evaluated on, which may be none."""

    learned: tuple[RawRow, ...]
    held_out: tuple[RawRow, ...] = ()


def read_job_rows(spec: JobSpec) -> JobRows:
    """The rows of a training job.

    Raises:
        DatasetError: something cannot be read, or rows cannot be used; the message names the first ten.
        UsageError: the rows are not of a form that a setting needs, or are too few to divide.
    """
    config = spec.data
    rows = read_raw_rows(spec.dataset, config, HubSplit.to_train(config))
    if config.eval_dataset:
        held_out = read_raw_rows(config.eval_dataset, config, HubSplit.to_evaluate(config))
        return JobRows(tuple(rows), tuple(held_out))
    return divide(rows, config.validation_split, spec.training.seed)


def divide(rows: Sequence[RawRow], share: float, seed: int) -> JobRows:
    """Holds out `share` of the rows, drawn by `seed`; at least one if `share` is not 0.

    Raises:
        UsageError: no row would be left to learn.
    """
    if not share:
        return JobRows(tuple(rows))
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        what = f"{count} of {len(rows)} rows held out leave nothing to learn"
        raise UsageError(what, field="validation_split", hint="give more rows, or a smaller part")
    chosen = set(random.Random(f"{seed}/validation").sample(range(len(rows)), count))
    learned, held_out = (
        tuple(row for place, row in enumerate(rows) if (place in chosen) is held) for held in (False, True)
    )
    return JobRows(learned, held_out)


def read_raw_rows(names: Sequence[str], config: DataConfig, hub: HubSplit) -> list[RawRow]:
    """Reads and checks every row of the named sources.

    Raises:
        DatasetError: as `read_job_rows`, or there is no row at all.
        UsageError: the rows are not of a form that a setting needs.
    """
    rows: list[RawRow] = []
    problems, unused = Problems(), dict[str, int]()
    for source, items in read_sources(names, hub):
        rows += _rows_of(source, items, config, problems, unused)
    problems.raise_any()
    if not rows:
        hint = "Give it at least one row"
        raise DatasetError("the data set is empty", where=", ".join(names), hint=hint)
    if unused:
        counts = ", ".join(f"'{name}' ({count} rows)" for name, count in unused.items())
        _log.warning("%s: these columns are not used: %s", ", ".join(names), counts)
    return rows


def _rows_of(
    source: str, items: Iterator[Item], config: DataConfig, problems: Problems, unused: dict[str, int]
) -> Iterator[RawRow]:
    first: RawRow | None = None
    for item in items:
        try:
            if isinstance(item, DatasetError):
                raise item
            checked = check_record(item, config)
            row = RawRow(checked.content, source, item.number)
            _require_like(row, first)
            if config.strict:
                _require_all_used(checked, row.where)
        except DatasetError as error:
            problems.add(error)
            continue
        if first is None:
            first = row
            _require_form(row, config)
        for name in checked.unused:
            unused[name] = unused.get(name, 0) + 1
        yield row


def _require_like(row: RawRow, first: RawRow | None) -> None:
    if first is not None and type(row.content) is not type(first.content):
        raise DatasetError(
            f"this row has the form '{FORM_NAMES[type(row.content)]}', "
            f"but line {first.line} has the form '{FORM_NAMES[type(first.content)]}'",
            where=row.where,
            hint="Keep to one form per file",
        )


def _require_all_used(checked: Checked, where: str) -> None:
    if checked.unused:
        names = ", ".join(f"'{name}'" for name in sorted(checked.unused))
        hint = "Take it out, or leave out `strict`"
        raise DatasetError(f"{names} does not belong here", where=where, hint=hint)


def _require_form(row: RawRow, config: DataConfig) -> None:
    """Compares the form with what the settings need. Raises `UsageError`."""
    form = type(row.content)
    says = f"{row.where} has the form '{FORM_NAMES[form]}'"
    if config.assistant_only_loss and form in (TextForm, StringPair):
        hint = "leave it out, or give messages"
        raise UsageError(f"{says}, in which there is no assistant", field="assistant_only_loss", hint=hint)
    if config.completion_only_loss and form not in (StringPair, MessagePair, InstructionForm):
        other = "; to learn the assistant's turns alone, give `assistant_only_loss`"
        raise UsageError(
            f"{says}, in which there is no completion",
            field="completion_only_loss",
            hint=f"leave it out{other if form is Conversation else ', or give prompt and completion'}",
        )
