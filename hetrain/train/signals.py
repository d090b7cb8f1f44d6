"""Ctrl-C while training: the first asks to finish what is in flight, the second leaves it behind."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Stop = Callable[[], bool]
"""Whether the user has asked to stop. Raises `KeyboardInterrupt` if that was not enough."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def never() -> bool:
    """A `Stop` for runs that nobody stops."""
    return False


@contextmanager
def stop_on_signals(tell: Callable[[], None]) -> Iterator[Stop]:
    """Takes the first SIGINT or SIGTERM as a question, and has the function it yields raise at the next one.

    Not the signal's handler: it may interrupt an update halfway, and an adapter that has half of one must not
    be written. So the function is to be called between updates, and often. Only from the third signal on the
    handler raises, for whoever has to get out of something that hangs.

    Does nothing in a thread that gets no signals. A signal that the process ignores stays ignored, as a shell
    wants it for its background jobs.

    Args:
        tell: called once, by the first call of the yielded function after a signal. Not by the handler
            either, which may interrupt a print or a lock anywhere.

    Raises:
        KeyboardInterrupt: at the second signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield never
        return
    asked, told = 0, False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        if asked > 2:
            raise KeyboardInterrupt

    def stop() -> bool:
        nonlocal told
        if asked > 1:
            raise KeyboardInterrupt
        if asked and not told:
            told = True
            tell()
        return asked > 0

    former = {number: signal.getsignal(number) for number in _SIGNALS}
    heard = [number for number, old in former.items() if old not in (signal.SIG_IGN, None)]
    for number in heard:
        signal.signal(number, handler)
    try:
        yield stop
    finally:
        for number in heard:
            signal.signal(number, former[number])
