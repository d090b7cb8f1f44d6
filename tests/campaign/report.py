"""A campaign in words: a line for each round, and one HTML page for all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tests.campaign.plan import KINDS, UPDATES, Job
from tests.campaign.records import Campaign, RoundRecord
from tests.campaign.rounds import DEADLINE_S

_SLOWEST = 15


@dataclass(frozen=True)
class Row:
    """What came of the faults of one kind, or of the rounds of one job.

    Attributes:
        name: of the kind or job.
        outcomes: how often a fault struck, missed or was left out; for a job, its rounds.
        violated: rounds of it with violations.
        median_s: of its rounds.
        longest_s: of its rounds.
        details: how often each variant struck.
    """

    name: str
    outcomes: Mapping[str, int]
    violated: int
    median_s: float
    longest_s: float
    details: Mapping[str, int]


def rows_by_kind(campaign: Campaign) -> list[Row]:
    """One row for each kind of fault. A round with two faults counts for both."""
    rows = []
    for kind in KINDS:
        rounds = [each for each in campaign.rounds if any(f.kind == kind for f in each.faults)]
        faults = [fault for each in rounds for fault in each.faults if fault.kind == kind]
        details = Counter(f.detail for f in faults if f.outcome == "struck" and f.detail)
        rows.append(_row(kind.value, rounds, Counter(fault.outcome for fault in faults), details))
    return rows


def rows_by_job(campaign: Campaign) -> list[Row]:
    """One row for each kind of job."""
    rows = []
    for job in Job:
        rounds = [each for each in campaign.rounds if each.job == job]
        rows.append(_row(job.value, rounds, {"rounds": len(rounds)}, {}))
    return rows


def _row(
    name: str, rounds: Sequence[RoundRecord], outcomes: Mapping[str, int], details: Mapping[str, int]
) -> Row:
    seconds = [each.seconds for each in rounds] or [0.0]
    violated = sum(bool(each.violations) for each in rounds)
    return Row(name, outcomes, violated, median(seconds), max(seconds), dict(sorted(details.items())))


def page(campaign: Campaign) -> str:
    """The page: self-contained HTML without scripts."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    slowest = sorted(campaign.rounds, key=lambda each: -each.seconds)[:_SLOWEST]
    return templates.get_template("report.html.jinja").render(
        campaign=campaign,
        kinds=rows_by_kind(campaign),
        jobs=rows_by_job(campaign),
        slowest=slowest,
        describe=describe,
        struck=sum(f.outcome == "struck" for each in campaign.rounds for f in each.faults),
        repeats=sum(each.repeats > 0 for each in campaign.rounds),
        hours=sum(each.seconds for each in campaign.rounds) / 3600,
        updates=UPDATES,
        deadline_s=DEADLINE_S,
    )


def describe(record: RoundRecord) -> str:
    """The faults of a round."""
    return "; ".join(
        f"{f.kind}{f' ({f.detail})' if f.detail else ''} after update {f.after_update}: {f.outcome}"
        f"{f', {f.what}' if f.what else ''}"
        for f in record.faults
    )


def line(record: RoundRecord) -> str:
    """A line on a round, and further ones on its violations."""
    violations = "".join(f"      VIOLATION: {violation}\n" for violation in record.violations)
    said = f"{record.said}\n" if record.said else ""
    return (
        f"{record.number:5}  {record.job:19} {record.seconds:6.1f} s  {describe(record)}\n{violations}{said}"
    )
