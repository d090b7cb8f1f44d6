"""Runs cases in a process of its own, with bounds on time and memory, and says what went wrong."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import resource
import shutil
import signal
import tempfile
import traceback
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic, process_time
from typing import Any

from tasks.supervisor.worker_process import tie_to_parent
from tests.fuzz.mutation import LONGEST, case

CPU_S = 5.0
"""Of one case: more is a finding."""
HANG_S = 300.0
"""Without an end of one case, however busy the machine: its process is killed."""
ADDRESS_SPACE = 512 << 20
"""Bytes that a process may map beyond what it has when its target is open; all its cases together."""
TRACED_BASE = 4 << 20
"""One case in `TRACED_EVERY` may have this much, and `Target.multiple` times its own length, at a time."""
TRACED_EVERY = 64
_LONGEST_TEXT = 3 * 4000 + 10
_OURS = ("/hetrain/", "/tasks/", "/worker_gpu/")


@dataclass(frozen=True)
class Opened:
    """A target that is ready: its valid inputs, and the function under test."""

    seeds: Sequence[bytes]
    run: Callable[[bytes], object]


@dataclass(frozen=True)
class Target:
    """A parser of bytes that a stranger may write.

    Attributes:
        name: as it is called on the command line.
        open: makes it ready; what is put into the directory is removed afterwards.
        allowed: the errors that it may raise. Their text must be printable, and bounded.
        longest: the most bytes of a case.
        multiple: how many times its length a case may take of Python's memory.
        lines: whether the errors' text may have several lines.
    """

    name: str
    open: Callable[[Path, ExitStack], Opened]
    allowed: tuple[type[Exception], ...]
    longest: int = LONGEST
    multiple: int = 64
    lines: bool = False


@dataclass(frozen=True)
class Finding:
    """What one case did that it may not do.

    Attributes:
        target: the target's name.
        case: the number of the case.
        problem: an exception that is not declared and where it was raised, or a bound that was passed.
    """

    target: str
    case: int
    problem: str


def input_of(target: Target, opened: Opened, seed: int, number: int) -> bytes:
    """The bytes of one case. The first ones are the valid inputs themselves."""
    if number < len(opened.seeds):
        return opened.seeds[number]
    return case(opened.seeds, f"{target.name}/{seed}/{number}", target.longest)


def attempt(target: Target, opened: Opened, data: bytes, *, is_traced: bool = False) -> str | None:
    """Runs one case. Returns what went wrong, None if nothing."""
    problem = None
    begin = process_time()
    if is_traced:
        tracemalloc.start()
    try:
        opened.run(data)
    except target.allowed as error:
        problem = _text_problem(str(error), target.lines)
    except BaseException as error:
        problem = _described(error)
    if is_traced:
        peak, most = tracemalloc.get_traced_memory()[1], TRACED_BASE + target.multiple * len(data)
        tracemalloc.stop()
        if peak > most:
            problem = (
                problem or f"more memory than {TRACED_BASE >> 20} MiB and {target.multiple} times the input"
            )
    if process_time() - begin > CPU_S:
        problem = problem or f"more than {CPU_S:.0f} s of computing"
    return problem


def run_cases(target: Target, seed: int, first: int, last: int, seconds: float) -> tuple[int, list[Finding]]:
    """Runs cases ``first:last`` of a target for about `seconds` at most.

    A case that ends its process, or does not end, is a finding; another process goes on after it.

    Returns:
        The number of the case to go on with, and what was found.
    """
    context, tie = multiprocessing.get_context("fork"), tie_to_parent()
    assert tie is not None
    ours, theirs = context.Pipe(duplex=False)
    current = context.RawValue("q", first)
    process = context.Process(
        target=_serve, args=(target, seed, first, last, seconds, theirs, current, tie), daemon=True
    )
    process.start()
    theirs.close()
    findings: list[Finding] = []
    seen, since = first, monotonic()
    try:
        while True:
            if current.value != seen:
                seen, since = current.value, monotonic()
            if monotonic() - since > HANG_S:
                return seen + 1, [*findings, Finding(target.name, seen, f"no end within {HANG_S:.0f} s")]
            if not ours.poll(0.2):
                continue
            try:
                message: Any = ours.recv()
            except EOFError:
                process.join()
                reason = f"its process ended with status {process.exitcode}"
                return current.value + 1, [*findings, Finding(target.name, current.value, reason)]
            if isinstance(message, int):
                return message, findings
            findings.append(message)
    finally:
        process.kill()
        process.join()
        ours.close()


def open_target(target: Target, stack: ExitStack) -> Opened:
    """Makes a target ready until `stack` is closed."""
    shared = Path("/dev/shm")
    directory = Path(tempfile.mkdtemp(prefix="hetrain-fuzz-", dir=shared if shared.is_dir() else None))
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    stack.callback(logging.disable, level)
    return target.open(directory, stack)


def _serve(
    target: Target,
    seed: int,
    first: int,
    last: int,
    seconds: float,
    connection: Connection,
    current: Any,
    tie: Callable[[], None],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tie()
    with ExitStack() as stack:
        opened = open_target(target, stack)
        _bound_memory()
        number, end, told = first, monotonic() + seconds, set[str]()
        while number < last and (number == first or monotonic() < end):
            current.value = number
            data = input_of(target, opened, seed, number)
            problem = attempt(target, opened, data, is_traced=number % TRACED_EVERY == 0)
            if problem is not None and problem not in told:
                told.add(problem)
                connection.send(Finding(target.name, number, problem))
            number += 1
        connection.send(number)


def _bound_memory() -> None:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _described(error: BaseException) -> str:
    """Class, text and the last place in our own code: alike for all cases that fail alike."""
    ours = [
        f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if any(part in frame.filename for part in _OURS) and "site-packages" not in frame.filename
    ]
    return f"{type(error).__module__}.{type(error).__qualname__} at {' '.join(ours[-1:]) or 'the target'}"


def _text_problem(text: str, may_have_lines: bool) -> str | None:
    if len(text) > _LONGEST_TEXT:
        return f"an error's text of more than {_LONGEST_TEXT} characters"
    if not all(line.isprintable() for line in (text.split("\n") if may_have_lines else [text])):
        return "an error's text that is not printable"
    return None
