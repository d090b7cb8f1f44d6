"""Waiting for conditions."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic, sleep
from typing import TypeVar

T = TypeVar("T")


def eventually(
    condition: Callable[[], T], timeout_s: float = 60, *, interval_s: float = 0.02, what: str = ""
) -> T:
    """The first true value that `condition` returns; exceptions that it raises end the wait.

    Args:
        condition: is called until it returns a true value.
        timeout_s: seconds after which an `AssertionError` is raised.
        interval_s: seconds between two calls.
        what: what is waited for, for the error's message.
    """
    end = monotonic() + timeout_s
    while not (value := condition()):
        assert monotonic() < end, f"not within {timeout_s:g} s: {what or condition.__qualname__}"
        sleep(interval_s)
    return value
