"""Tests that need the machine for themselves, in a run of several processes.

Every test holds a lock while it runs: shared, or exclusive where it is marked `alone`. All of them pass
through a second lock, the gate, which a test that waits for exclusive use keeps closed; otherwise the others
could keep the lock shared for ever.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def machine_lock(directory: Path, *, exclusive: bool) -> Iterator[None]:
    """Holds the lock of all processes that use `directory`."""
    with (directory / "machine.lock").open("w") as machine:
        with (directory / "gate.lock").open("w") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)
            fcntl.flock(machine, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
