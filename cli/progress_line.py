"""The line that says how far a run is: a pure function of what is known and of the room there is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

_GAP = "  "
_LEAST_BAR, _MOST_BAR = 6, 24
_LINE_EVERY_S = 30.0


@dataclass(frozen=True)
class LineState:
    """What is known of a run.

    Attributes:
        doing: in a word or two.
        done: how many of `total` are done.
        total: None while that is not known.
        seconds_left: None while that is not known.
        loss: smoothed; None before there is one.
        tokens_per_s: None before there is one.
        waits_for: what most of the time goes to.
        workers: that have computed lately; 0 while that is not known.
    """

    doing: str
    done: int = 0
    total: int | None = None
    seconds_left: float | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    waits_for: str = ""
    workers: int = 0


def progress_line(state: LineState, width: int | None, bar: tuple[str, str] = ("━", "─")) -> str:
    """One line of at most `width` columns; without a bar and with everything for None.

    Count and time left come first and are there at any width from 40 on; then a bar; then loss, tokens per
    second, what it waits for and workers, as many as fit, in this order.

    Args:
        state: what is known.
        width: columns.
        bar: what the done and the missing part of the bar are made of.
    """
    needed = [state.doing]
    if state.total is not None:
        needed += [f"{state.done}/{state.total}", time_left(state.seconds_left)]
    others = [each for each in _figures(state) if each]
    if width is None:
        return _GAP.join(needed + others)
    if len(_GAP.join(needed)) > width:
        needed = needed[1:] or needed
    has_bar = state.total is not None and len(_GAP.join(needed)) + len(_GAP) + _LEAST_BAR <= width
    taken = len(_GAP.join(needed)) + (len(_GAP) + _LEAST_BAR) * has_bar
    shown = []
    for each in others:
        if taken + len(_GAP) + len(each) > width:
            break
        shown.append(each)
        taken += len(_GAP) + len(each)
    if has_bar:
        room = min(_LEAST_BAR + width - taken, _MOST_BAR)
        needed.insert(len(needed) - 2, _bar(state, room, bar))
    return _GAP.join(needed + shown)[:width]


def time_left(seconds: float | None) -> str:
    """Such as ``3:20 left``; with days above a hundred hours."""
    if seconds is None or not math.isfinite(seconds):
        return "-:-- left"
    whole = max(0, round(seconds))
    minutes, hours = whole // 60, whole // 3600
    if hours >= 100:
        return f"{hours // 24}d {hours % 24}h left"
    if hours:
        return f"{hours}:{minutes % 60:02}:{whole % 60:02} left"
    return f"{minutes}:{whole % 60:02} left"


def is_line_due(step: int, total: int, since_last_s: float | None) -> bool:
    """Whether a file or a CI log gets a line for update `step`: the first, the last, and every half minute.

    Args:
        step: the update.
        total: how many there are.
        since_last_s: seconds since the line before; None if there is none.
    """
    return since_last_s is None or step == total or since_last_s >= _LINE_EVERY_S


def largest_share(seconds: Mapping[str, float]) -> str:
    """The name of the most seconds, with its part of all of them; empty if there are none."""
    total = sum(seconds.values())
    if total <= 0:
        return ""
    name = max(seconds, key=lambda each: seconds[each])
    return f"{name} {seconds[name] / total:.0%}"


def _figures(state: LineState) -> list[str]:
    return [
        "" if state.loss is None else f"loss {state.loss:.3f}",
        "" if state.tokens_per_s is None else f"{state.tokens_per_s:.0f} tok/s",
        state.waits_for,
        "" if not state.workers else f"{state.workers} worker{'s' * (state.workers > 1)}",
    ]


def _bar(state: LineState, length: int, bar: tuple[str, str]) -> str:
    done = length * min(state.done, state.total or 0) // state.total if state.total else 0
    return bar[0] * done + bar[1] * (length - done)
