"""Ctrl-C while training: the first finishes what is in flight, the second abandons it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Stop = Callable[[], bool]
"""Whether a signal has asked the run to stop. Raises `KeyboardInterrupt` after a second one."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def never() -> bool:
    """A `Stop` for runs without signals."""
    return False


@contextmanager
def stop_on_signals(on_stop: Callable[[], None]) -> Iterator[Stop]:
    """Yields a function that returns whether a SIGINT or SIGTERM has come, and raises after a second one.

    The function, not the signal's handler, raises: a handler may interrupt an update halfway, and an adapter
    that has half of one must not be written. So call it between updates, and often. Only from the third
    signal on the handler raises, as a way out of a call that hangs.

    Does nothing outside the main thread, which alone gets signals. A signal that the process ignores stays
    ignored, as a shell requires for its background jobs.

    Args:
        on_stop: called once, by the first call of the yielded function after a signal; not by the handler
            either, which may interrupt a print or a lock anywhere.

    Raises:
        KeyboardInterrupt: at the second signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield never
        return
    signals, announced = 0, False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal signals
        signals += 1
        if signals > 2:
            raise KeyboardInterrupt

    def stop() -> bool:
        nonlocal announced
        if signals > 1:
            raise KeyboardInterrupt
        if signals and not announced:
            announced = True
            on_stop()
        return signals > 0

    former = {number: signal.getsignal(number) for number in _SIGNALS}
    handled = [number for number, old in former.items() if old not in (signal.SIG_IGN, None)]
    for number in handled:
        signal.signal(number, handler)
    try:
        yield stop
    finally:
        for number in handled:
            signal.signal(number, former[number])
