"""Processes by more than their numbers, which the system gives to others after their end."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Liveness(Enum):
    """What this machine knows of a process."""

    ALIVE = "alive"
    GONE = "gone"
    ELSEWHERE = "elsewhere"
    """It runs, or ran, on another machine."""


@dataclass(frozen=True)
class ProcessIdentity:
    """A process of a machine.

    Attributes:
        pid: its number.
        start: when it began: the machine's boot, and clock ticks since then. Exact, where a time of day would
            depend on how the clock was set since.
        host: its machine.
    """

    pid: int
    start: str
    host: str


def this_process() -> ProcessIdentity:
    """The one that calls this."""
    return ProcessIdentity(os.getpid(), start_of(os.getpid()), socket.gethostname())


def start_of(pid: int) -> str:
    """When the process of this number began; empty if there is none, or one that only waits to be reaped."""
    try:
        # After the name, which is in parentheses and may hold any character: state, parent, ...; see proc(5).
        state, *fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        boot = _BOOT.read_text().strip()
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" else f"{boot}:{fields[18]}"


def liveness(process: ProcessIdentity) -> Liveness:
    """Whether a process runs."""
    return judge(process, socket.gethostname(), start_of(process.pid))


def judge(process: ProcessIdentity, host: str, start: str) -> Liveness:
    """Whether a process runs, judged on `host`, where one of its number began at `start`; empty: none."""
    if process.host != host:
        return Liveness.ELSEWHERE
    return Liveness.ALIVE if start and start == process.start else Liveness.GONE
