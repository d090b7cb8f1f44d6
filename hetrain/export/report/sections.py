"""What the page on a run shows, from its records: a title, a sentence or two, and a chart each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

from hetrain.export.report.charts import Lane, Point, Series, Share, line_chart, stacked_bar, timeline
from hetrain.train.model_card import protection_rows
from hetrain.train.records import Record, RunRecord, dataset_label

_BINS = 240
_MOST_DOTS = 2000
_SHORT_RUN = 20


@dataclass(frozen=True)
class Section:
    """A part of the page; `text` and `body` are HTML."""

    title: str
    text: str
    body: str


def sections(run: RunRecord) -> list[Section]:
    """All sections, in their order."""
    return [
        _loss(run),
        _staleness(run),
        _time(run),
        _bytes(run),
        _workers(run),
        _noise(run),
        _verification(run),
        _configuration(run),
    ]


def _loss(run: RunRecord) -> Section:
    dots = [(r["step"], r["loss"]) for r in run.micro_batches if r.get("loss") is not None]
    series = [
        Series("micro-batch", dots[:: len(dots) // _MOST_DOTS + 1], "dots", 2),
        Series("mean of each update", _smoothed(_by_update(dots)), "line", 1),
    ]
    evaluated = [r for r in run.evaluations if r.get("step") is not None and r.get("loss") is not None]
    for colour, (name, records) in enumerate(_grouped(evaluated), start=3):
        points = sorted((r["step"], r["loss"]) for r in records)
        series.append(Series(f"evaluation: {name}", points, "marks", min(colour, 6)))
    told = "".join(
        f"<li>After {r['step']} updates, {escape(dataset_label(r))}: loss {r['loss']:.4f}, "
        f"perplexity {r['perplexity']:.2f} over {r['targets']} targets</li>"
        for r in evaluated
    )
    text = f"<ul>{told}</ul>" if told else "<p>No evaluation was recorded.</p>"
    return Section("Loss", text, line_chart("Loss by update", series, "update", "loss"))


def _staleness(run: RunRecord) -> Section:
    points = [(float(r["step"]), float(r["staleness"])) for r in run.micro_batches]
    allowed = run.job["training"]["max_staleness"]
    if not allowed:
        return Section("Staleness", "<p>None: updates were made in lock step.</p>", "")
    largest = _by_update(points, max)
    text = (
        "<p>Updates between the adapter that a micro-batch started from and its own update, at most "
        f"{allowed}: the largest of each update.</p>"
    )
    series = [Series("staleness", largest, "line", 1)]
    return Section(
        "Staleness", text, line_chart("Staleness by update", series, "update", "updates", from_zero=True)
    )


def _time(run: RunRecord) -> Section:
    total = {
        key: run.total(key) for key in ("seconds", "encrypt_s", "wait_s", "verify_s", "decrypt_s", "server_s")
    }
    away = max(total["wait_s"] - total["verify_s"], 0.0)
    computing = min(total["server_s"], away)
    own = max(total["seconds"] - total["encrypt_s"] - total["wait_s"] - total["decrypt_s"], 0.0)
    parts = [
        ("workers computing", computing),
        ("transfer and queues", away - computing),
        ("encrypting", total["encrypt_s"]),
        ("verifying", total["verify_s"]),
        ("decrypting", total["decrypt_s"]),
        ("own layers, adapter, loss", own),
    ]
    shares = [Share(name, value, f"{value:.1f} s", colour) for colour, (name, value) in enumerate(parts, 1)]
    text = (
        f"<p>Seconds of all micro-batches added up: {total['seconds']:.0f}, in {_duration(run):.0f} s of "
        "training; several may be under way at once.</p>"
    )
    return Section("Where time went", text, stacked_bar("Where time went", shares))


def _bytes(run: RunRecord) -> Section:
    up, down, tokens = run.total("bytes_up"), run.total("bytes_down"), run.total("tokens")
    shares = [Share("operands, up", up, _size(up), 1), Share("results, down", down, _size(down), 2)]
    text = f"<p>{_size((up + down) / tokens)} for each token of training.</p>" if tokens else ""
    return Section("Where bytes went", text, stacked_bar("Where bytes went", shares))


def _workers(run: RunRecord) -> Section:
    seconds = _duration(run)
    lanes = [Lane("client, own computing", _busy(_own_spans(run), seconds), 2)]
    for name in run.names("workers"):
        alarms = [_begin(r) for r in run.micro_batches if name in (r.get("rejected_workers") or ())]
        lanes.append(Lane(name, _busy(_worker_spans(run, name), seconds), 1, alarms))
    text = (
        "<p>The share of each interval in which one computed, on average over the micro-batch: a worker's "
        "seconds are known for each micro-batch as a whole. A cross marks a rejected result.</p>"
    )
    return Section("Workers", text, timeline("How busy workers were", lanes, seconds))


def _noise(run: RunRecord) -> Section:
    headroom = run.job.get("protection", {}).get("headroom_bits", {})
    pairs = list(headroom.values())
    if not pairs:
        return Section("Noise headroom", "<p>No bound was recorded, or results are exact.</p>", "")
    series = [
        Series("product with W", [(i, pair[0]) for i, pair in enumerate(pairs)], "dots", 1),
        Series("product with Wᵀ", [(i, pair[1]) for i, pair in enumerate(pairs)], "dots", 2),
    ]
    text = (
        "<p>How many times half the modulus holds the largest error of a result, as a power of two, by the "
        "bound that the scales are chosen for. It is not measured. At 0 bits nothing would be left for the "
        "values; above 0 nothing wraps.</p>"
    )
    chart = line_chart("Noise headroom by group", series, "group of matrices", "bits", from_zero=True)
    return Section("Noise headroom", text, chart)


def _verification(run: RunRecord) -> Section:
    if "protection" not in run.job:
        return Section("Verification and protection", "<p>Nothing was recorded.</p>", "")
    return Section("Verification and protection", "", _table(protection_rows(run)))


def _configuration(run: RunRecord) -> Section:
    hidden = ("protection", "prompt")
    rows = [(key, value) for key, value in _flat(run.job) if key.partition(".")[0] not in hidden]
    return Section("Configuration", "", f"<details><summary>job.json</summary>{_table(rows)}</details>")


def _by_update(points: Iterable[Point], combine: Any = None) -> list[Point]:
    combined = []
    for step, group in groupby(points, key=lambda point: point[0]):
        values = [value for _, value in group]
        combined.append((step, combine(values) if combine else sum(values) / len(values)))
    return combined


def _smoothed(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average without the bias of its start; of a short run, the points themselves."""
    mean, weight, smooth = 0.0, 0.0, []
    kept = min(max(1 - _SHORT_RUN / max(len(points), 1), 0.0), 0.9)
    for x, y in points:
        mean, weight = kept * mean + (1 - kept) * y, kept * weight + 1 - kept
        smooth.append((x, mean / weight))
    return smooth[:: len(smooth) // _MOST_DOTS + 1]


def _grouped(evaluations: Sequence[Record]) -> Iterator[tuple[str, list[Record]]]:
    for name in sorted({dataset_label(r) for r in evaluations}):
        yield name, [r for r in evaluations if dataset_label(r) == name]


def _duration(run: RunRecord) -> float:
    return max((r["elapsed_s"] for r in run.micro_batches), default=0.0)


def _begin(record: Record) -> float:
    return float(record.get("begin_s", record["elapsed_s"] - record["seconds"]))


Span = tuple[float, float, float]
"""Begin, end, and seconds of computing in between."""


def _own_spans(run: RunRecord) -> Iterator[Span]:
    for r in run.micro_batches:
        begin, own = _begin(r), r["seconds"] - r["wait_s"] + r["verify_s"]
        yield begin, begin + r["seconds"], own


def _worker_spans(run: RunRecord, name: str) -> Iterator[Span]:
    for r in run.micro_batches:
        begin, computed = _begin(r), (r.get("workers") or {}).get(name, 0.0)
        yield begin, begin + r["seconds"], computed


def _busy(spans: Iterable[Span], seconds: float) -> list[float]:
    """The share of each of `_BINS` intervals that is computing, at most 1."""
    bins, width = [0.0] * _BINS, max(seconds, 1e-9) / _BINS
    for begin, end, computed in spans:
        rate = computed / max(end - begin, 1e-9)
        for index in range(max(int(begin / width), 0), min(int(end / width) + 1, _BINS)):
            overlap = min(end, (index + 1) * width) - max(begin, index * width)
            bins[index] += rate * max(overlap, 0.0) / width
    return [min(value, 1.0) for value in bins]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def _size(count: float) -> str:
    units = ("B", "kB", "MB", "GB", "TB")
    exponent = 0
    while count >= 1000 and exponent < len(units) - 1:
        count, exponent = count / 1000, exponent + 1
    return f"{count:.3g} {units[exponent]}"
