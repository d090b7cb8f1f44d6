"""Signals while training: the first finishes what is in flight, the second abandons it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from hetrain.public.system import leave_dead_terminal

Stop = Callable[[], bool]
"""Whether a signal has asked the run to stop. Raises `KeyboardInterrupt` after a second one."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def never() -> bool:
    """A `Stop` for runs without signals."""
    return False


@contextmanager
def restored_handlers() -> Iterator[None]:
    """Gives signals their handlers back when the block ends, but for SIGHUP where that is ignored by now."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, old in former.items():
            if old is not None and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, old)


@contextmanager
def stop_on_signals(on_stop: Callable[[], None]) -> Iterator[Stop]:
    """Yields a function that returns whether a signal has asked to stop, and raises after a second one.

    Signals are SIGINT, SIGTERM and SIGHUP. A terminal that closes sends SIGHUP more than once: it counts
    once, and is ignored from then on.

    The function, not the signal's handler, raises: a handler may interrupt an update halfway, and an adapter
    that has half of one must not be written. So call it between updates, and often. Only from the third
    signal on the handler raises, as a way out of a call that hangs.

    After a signal the handler stays when the block ends, so that another one does not interrupt what is then
    written: the run is over. `restored_handlers` around it ends that.

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
    signals, announced, hung_up = 0, False, False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal signals, hung_up
        if number == signal.SIGHUP:
            leave_dead_terminal()
            if hung_up:
                return
            hung_up = True
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
            if hung_up and number == signal.SIGHUP:
                signal.signal(number, signal.SIG_IGN)
            elif not signals:
                signal.signal(number, former[number])
