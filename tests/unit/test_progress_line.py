"""The progress line: count and time left are there at any width, and no line is longer than there is room."""

from __future__ import annotations

import io
import re
from contextlib import suppress
from itertools import product

import pytest
from rich.console import Console

from cli.progress import StatusLine, TrainingDisplay
from cli.progress_line import LineState, is_line_due, largest_share, progress_line, time_left

WIDTHS = range(40, 201)
STATES = [
    LineState(doing, done, total, seconds, loss, rate, waits, workers)
    for doing, (done, total), seconds, (loss, rate, waits, workers) in product(
        ("preparing", "making hints", "training", "evaluating", "stopping"),
        ((0, 7), (7, 7), (99, 100), (12345, 100000)),
        (None, 0.2, 61.0, 3_599.6, 86_400.0, 10_000_000.0),
        ((None, None, "", 0), (11.384, 1234.5, "own layers 100%", 1), (0.002, 35.0, "encryption 62%", 128)),
    )
]


@pytest.mark.parametrize("width", WIDTHS)
def test_count_and_time_left_are_never_lost(width: int) -> None:
    for state in STATES:
        line = progress_line(state, width)
        assert len(line) <= width
        assert f"{state.done}/{state.total}" in line
        assert time_left(state.seconds_left) in line
        shown = [bool(each in line) for each in ("loss ", "tok/s", "%", " worker")]
        assert shown == sorted(shown, reverse=True), "the more important figure first"
        if width >= 60:
            assert state.doing in line
            (bar,) = re.findall("[━─]{6,24}", line)
            assert bar.count("━") == len(bar) * state.done // state.total  # type: ignore[operator]
        # Where there is room for more, more is shown.
        assert len(progress_line(state, width + 1)) >= len(line)


def test_at_the_usual_width_the_loss_is_there_and_at_a_hundred_columns_everything() -> None:
    state = LineState("training", 12, 100, 200.0, 2.3104, 345.2, "workers 62%", 2)
    assert "loss 2.310" in progress_line(state, 80)
    figures = "12/100  3:20 left  loss 2.310  345 tok/s  workers 62%  2 workers"
    assert progress_line(state, 100) == f"training  {'━' * 2}{'─' * 22}  {figures}"
    assert progress_line(state, None) == f"training  {figures}"
    assert progress_line(LineState("preparing"), 80) == "preparing"


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_terminal_shows_one_line(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    line = StatusLine(console, STATES[-1])
    with console.capture() as caught:
        console.print(line)
    assert caught.get().rstrip("\n") == progress_line(STATES[-1], width)


def test_a_file_gets_a_line_at_first_at_last_and_every_half_minute() -> None:
    assert is_line_due(1, 100, None)
    assert not is_line_due(2, 100, 29.9)
    assert is_line_due(2, 100, 30.0)
    assert is_line_due(100, 100, 0.1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-:--"),
        (float("inf"), "-:--"),
        (-3.0, "0:00"),
        (59.7, "1:00"),
        (3600.0, "1:00:00"),
        (359_999.0, "99:59:59"),
        (360_000.0, "4d 4h"),
    ],
)
def test_time_left(seconds: float | None, text: str) -> None:
    assert time_left(seconds) == f"{text} left"


def test_the_largest_share_is_named() -> None:
    assert largest_share({"workers": 3.0, "network": 1.0}) == "workers 75%"
    assert largest_share({}) == ""


def test_a_full_disk_takes_lines_from_the_display_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    full = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr("sys.stdout", full)
    with TrainingDisplay(as_json=True, quiet=False) as display:
        display.on_prepare(1, 2)
        display.on_stop()
    with suppress(OSError):
        full.close()
