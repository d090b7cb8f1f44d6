"""Ctrl-C while training: the first asks to finish what is in flight, the second leaves at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Stop = Callable[[], bool]
"""Whether the user has asked to stop."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def never() -> bool:
    """A `Stop` for runs that nobody stops."""
    return False


@contextmanager
def stop_on_signals(tell: Callable[[], None]) -> Iterator[Stop]:
    """Takes the first SIGINT or SIGTERM as a question, and raises `KeyboardInterrupt` at the next one.

    Does nothing in a thread that gets no signals. A signal that the process ignores stays ignored, as a shell
    wants it for its background jobs.

    Args:
        tell: called once, by the first call of the yielded function after a signal. Not by the signal's
            handler, which may interrupt a print or a lock anywhere.
    """
    if threading.current_thread() is not threading.main_thread():
        yield never
        return
    asked = told = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    def stop() -> bool:
        nonlocal told
        if asked and not told:
            told = True
            tell()
        return asked

    former = {number: signal.getsignal(number) for number in _SIGNALS}
    heard = [number for number, old in former.items() if old not in (signal.SIG_IGN, None)]
    for number in heard:
        signal.signal(number, handler)
    try:
        yield stop
    finally:
        for number in heard:
            signal.signal(number, former[number])
