"""Charts as inline SVG. Colours are classes of the page's style sheet: they follow its colour scheme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 42
_BAR, _LANE = 26, 44
_NAME_WIDTH = 190

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line or cloud of a chart.

    Attributes:
        label: its name in the legend.
        points: x and y, in the order of x.
        style: ``line``, ``dots``, or ``marks``, which are large.
        colour: number of a colour of the page, from 1 to 6.
    """

    label: str
    points: Sequence[Point]
    style: str = "line"
    colour: int = 1


@dataclass(frozen=True)
class Share:
    """One part of a bar, or a row of a table, with its text."""

    label: str
    value: float
    text: str
    colour: int


@dataclass(frozen=True)
class Lane:
    """One row of a timeline: `busy` has the share of each interval, 0 to 1, `alarms` times in seconds."""

    label: str
    busy: Sequence[float]
    colour: int = 1
    alarms: Sequence[float] = ()


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    span = high - low
    if not span > 0:
        return [low]
    size = 10 ** math.floor(math.log10(span / count))
    step = next(size * each for each in (1, 2, 5, 10) if size * each * count >= span)
    first = math.ceil(low / step - 1e-9)
    return [step * index for index in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(
    title: str, series: Sequence[Series], x_name: str, y_name: str, *, from_zero: bool = False
) -> str:
    """A chart of lines and dots with a legend; says so when there is nothing to draw."""
    xs = [x for each in series for x, _ in each.points]
    ys = [y for each in series for _, y in each.points]
    if not xs:
        return _nothing()
    low, high = (0.0 if from_zero else min(ys)), max(ys)
    margin = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    scale = _Scale(min(xs), max(xs), low if from_zero else low - margin, high + margin)
    drawn = "".join(_draw(each, scale) for each in series if each.points)
    return _svg(title, HEIGHT, scale.axes(x_name, y_name) + drawn) + _legend(
        [(each.label, each.colour) for each in series if each.points]
    )


def stacked_bar(title: str, shares: Sequence[Share]) -> str:
    """One bar of all shares, and a table of them."""
    total = sum(share.value for share in shares)
    if total <= 0:
        return _nothing()
    x, parts = 0.0, []
    for share in shares:
        width = WIDTH * share.value / total
        shown = max(width - 1, 0)  # a gap to the next
        parts.append(
            f'<rect class="f{share.colour}" x="{x:.1f}" y="0" width="{shown:.1f}" height="{_BAR}">'
            f"<title>{escape(share.label)}: {escape(share.text)}</title></rect>"
        )
        x += width
    rows = "".join(
        f'<tr><td><span class="key b{share.colour}"></span>{escape(share.label)}</td>'
        f'<td class="n">{escape(share.text)}</td><td class="n">{share.value / total:.1%}</td></tr>'
        for share in shares
    )
    return f"{_svg(title, _BAR, ''.join(parts))}<table>{rows}</table>"


def timeline(title: str, lanes: Sequence[Lane], seconds: float) -> str:
    """Lanes over the same time; a lane's height at a time is how busy it was, alarms are crosses."""
    if not lanes or seconds <= 0:
        return _nothing()
    width, height = WIDTH - _NAME_WIDTH - _RIGHT, _LANE * len(lanes)
    parts = []
    for index, lane in enumerate(lanes):
        bottom = _LANE * (index + 1) - 6
        share = sum(lane.busy) / len(lane.busy)
        parts.append(
            f'<text x="0" y="{bottom - 16}">{escape(_shortened(lane.label))}</text>'
            f'<text class="dim" x="0" y="{bottom - 1}">{share:.0%} busy</text>'
            f'<line class="grid" x1="{_NAME_WIDTH}" x2="{WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>'
        )
        step = width / len(lane.busy)
        outline = "".join(
            f"V{bottom - busy * (_LANE - 12):.1f}H{_NAME_WIDTH + step * (at + 1):.1f}"
            for at, busy in enumerate(lane.busy)
        )
        parts.append(f'<path class="f{lane.colour}" d="M{_NAME_WIDTH},{bottom}{outline}V{bottom}Z"/>')
        parts += [
            f'<text class="alarm" x="{_NAME_WIDTH + width * at / seconds:.1f}" y="{bottom - 20}">✕'
            "<title>a result was rejected</title></text>"
            for at in lane.alarms
        ]
    for tick in ticks(0, seconds):
        x = _NAME_WIDTH + width * tick / seconds
        parts.append(
            f'<text class="dim" text-anchor="middle" x="{x:.1f}" y="{height + 14}">{_number(tick)}</text>'
        )
    parts.append(f'<text class="dim" x="0" y="{height + 14}">seconds</text>')
    return _svg(title, height + 20, "".join(parts))


@dataclass(frozen=True)
class _Scale:
    left: float
    right: float
    bottom: float
    top: float

    def x(self, value: float) -> float:
        span = (self.right - self.left) or 1.0
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (value - self.left) / span

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (value - self.bottom) / (self.top - self.bottom)

    def axes(self, x_name: str, y_name: str) -> str:
        parts = []
        y_ticks = ticks(self.bottom, self.top)
        if self.bottom == 0 and self.top >= 1:  # counts
            y_ticks = [tick for tick in y_ticks if tick == round(tick)]
        for tick in y_ticks:
            y = self.y(tick)
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="dim" text-anchor="end" x="{_LEFT - 8}" y="{y + 4:.1f}">{_number(tick)}</text>'
            )
        for tick in (tick for tick in ticks(self.left, self.right, 8) if tick == round(tick)):
            parts.append(
                f'<text class="dim" text-anchor="middle" x="{self.x(tick):.1f}" '
                f'y="{HEIGHT - _BOTTOM + 16}">{_number(tick)}</text>'
            )
        across, along = (_LEFT + WIDTH - _RIGHT) / 2, (_TOP + HEIGHT - _BOTTOM) / 2
        parts.append(
            f'<text text-anchor="middle" x="{across}" y="{HEIGHT - 6}">{escape(x_name)}</text>'
            f'<text text-anchor="middle" transform="translate(12 {along}) rotate(-90)">'
            f"{escape(y_name)}</text>"
        )
        return "".join(parts)


def _draw(series: Series, scale: _Scale) -> str:
    places = [(scale.x(x), scale.y(y)) for x, y in series.points]
    if series.style == "line" and len(places) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        return f'<polyline class="s{series.colour}" points="{path}"/>'
    radius = {"dots": 2.5, "marks": 5.5}.get(series.style, 3)
    return "".join(
        f'<circle class="f{series.colour} {series.style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
        f"<title>{escape(series.label)}: {point[1]:.4g} at {point[0]:.6g}</title></circle>"
        for (x, y), point in zip(places, series.points, strict=True)
    )


def _svg(title: str, height: float, content: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(title)}" '
        f'viewBox="0 0 {WIDTH} {height}">{content}</svg>'
    )


def _legend(entries: Sequence[tuple[str, int]]) -> str:
    keys = "".join(
        f'<span><span class="key b{colour}"></span>{escape(label)}</span>' for label, colour in entries
    )
    return f'<p class="legend">{keys}</p>'


def _nothing() -> str:
    return '<p class="dim">Nothing was recorded.</p>'


def _shortened(text: str, longest: int = 26) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _number(value: float) -> str:
    return f"{value:.6g}"
