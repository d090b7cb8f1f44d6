"""Worker processes: started, bound to the life of their supervisor, restarted when they die, stopped."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import IO, Any

from hetrain.public.errors import WorkerError
from hetrain.public.protocol.messages import QUEUE
from hetrain.public.system import available_cores, child_environment

_GRACE_S = 3.0
_PR_SET_PDEATHSIG = 1
_MAX_RESTARTS = 10
_MAX_FAILED_STARTS = 3
_EARLY_DEATH_S = 60.0
_FIRST_PAUSE_S = 0.2
_MAX_PAUSE_S = 10.0


def tie_to_parent() -> Callable[[], None] | None:
    """What a child runs before exec so that it is killed when its parent's thread ends (Linux only)."""
    if sys.platform != "linux":
        return None
    libc, parent = ctypes.CDLL(None, use_errno=True), os.getpid()

    def tie() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before prctl
            os._exit(1)

    return tie


def threads_per_worker(workers: int) -> int:
    """CPU threads for each of several workers on this machine; 0, which is torch's choice, for one."""
    return max(1, available_cores() // workers) if workers > 1 else 0


def spawn_worker(
    name: str, settings: Mapping[str, str], log: IO[Any], *, ready: int | None = None
) -> subprocess.Popen[bytes]:
    """Starts a Celery worker in its own session. Call it from the main thread: the worker ends with it.

    Args:
        name: its name before the ``@``.
        settings: environment variables beside this process's own.
        log: its output.
        ready: a file descriptor it writes to and closes when it is ready to take tasks.
    """
    environment = child_environment() | dict(settings)
    if ready is not None:
        environment["HETRAIN_READY_FD"] = str(ready)
    command = ["worker", "-Q", QUEUE, "-E", "-l", "INFO"]
    return subprocess.Popen(
        [sys.executable, "-m", "tasks", *command, "-n", f"{name}@%h"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        pass_fds=() if ready is None else (ready,),
        preexec_fn=tie_to_parent(),
    )


@dataclass
class SupervisedWorker:
    """A worker that is restarted when it dies, within limits.

    Attributes:
        start: starts it, with the file descriptor that it writes to when it is ready.
        persistent: give up only when its configuration cannot work.
        deaths: how often in a row it died early.
        failed_starts: how often in a row it died before it was ready.
        status: what it last exited with, None before that.
        process: its process, while that runs.
    """

    start: Callable[[int], subprocess.Popen[bytes]]
    persistent: bool = False
    deaths: int = 0
    failed_starts: int = 0
    status: int | None = None
    process: subprocess.Popen[bytes] | None = None
    _not_before: float = field(default=0.0, repr=False)
    _started_at: float = field(default=0.0, repr=False)
    _ready: int = field(default=-1, repr=False)

    def ensure_running(self) -> None:
        """Starts the worker unless it runs. Raises `WorkerError` when another start would not help."""
        if self.process is not None and self.process.poll() is not None:
            self._record_exit(self.process.returncode)
        if self.process is None and monotonic() >= self._not_before:
            self._ready, child_end = os.pipe()
            os.set_blocking(self._ready, False)
            self._started_at = monotonic()
            try:
                self.process = self.start(child_end)
            finally:
                os.close(child_end)

    def _record_exit(self, status: int) -> None:
        try:
            was_ready = bool(os.read(self._ready, 1))
        except BlockingIOError:
            was_ready = False
        os.close(self._ready)
        self.process, self.status = None, status
        self.failed_starts = 0 if was_ready else self.failed_starts + 1
        self.deaths = 1 if monotonic() - self._started_at > _EARLY_DEATH_S else self.deaths + 1
        if status == os.EX_CONFIG:
            raise WorkerError("the worker cannot start as it is configured", hint="see its log")
        if not self.persistent:
            self._check_limits(status)
        doublings = min(self.deaths - 1, 10)
        self._not_before = monotonic() + min(_FIRST_PAUSE_S * 2**doublings, _MAX_PAUSE_S)

    def _check_limits(self, status: int) -> None:
        if self.failed_starts >= _MAX_FAILED_STARTS:
            raise WorkerError(f"the worker does not start (exit status {status})", hint="see its log")
        if self.deaths > _MAX_RESTARTS:
            raise WorkerError(f"the worker died {self.deaths} times, each time early", hint="see its log")


def stop(
    processes: Sequence[subprocess.Popen[Any]],
    grace_s: float = _GRACE_S,
    first: signal.Signals = signal.SIGTERM,
) -> None:
    """Ends processes and their groups by the signal `first`, and by SIGKILL after `grace_s` seconds."""
    for signum, timeout_s in ((first, grace_s), (signal.SIGKILL, 5.0)):
        end = monotonic() + timeout_s
        for process in processes:
            if process.poll() is None:
                try:
                    os.killpg(process.pid, signum)
                except ProcessLookupError:
                    continue
        for process in processes:
            try:
                process.wait(max(0.0, end - monotonic()))
            except subprocess.TimeoutExpired:
                continue
