"""Workers that start in a fraction of a second, and are replaced as soon as they die.

A process that has imported everything a worker needs, and in which nothing else has happened, forks one
worker after the other, each in its own session, as ``celery -A tasks worker -Q gpu`` would make it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from celery import signals

from hetrain.public.protocol.messages import QUEUE
from tasks.supervisor.server import tie_to_parent
from tests.harness.waiting import eventually

_MODULES = ("celery.bin.celery", "celery.apps.worker", "celery.concurrency.thread", "worker_gpu.service")
_OPTIONS = ("-Q", QUEUE, "-E", "-l", "INFO")


class ForkedWorkers:
    """The workers that a fork server keeps running."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._ready: dict[int, bool] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def await_ready(self, workers: int) -> None:
        """Returns when so many workers take tasks."""

        def all_ready() -> bool:
            assert self._server.poll() is None, "the fork server has ended"
            return sum(self.running().values()) >= workers

        eventually(all_ready, 120)

    def running(self) -> dict[int, bool]:
        """Process ids, and whether they have taken up work."""
        with self._lock:
            return dict(self._ready)

    def kill(self, pid: int) -> None:
        """Kills one worker; the fork server replaces it."""
        with self._lock:
            os.kill(pid, signal.SIGKILL)
            del self._ready[pid]

    def stop(self) -> None:
        """Ends the fork server and all workers."""
        self._server.kill()
        self._server.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self._server.stdout is not None
        for line in self._server.stdout:
            state, pid = line.split()
            with self._lock:
                if state == "start" or int(pid) in self._ready:
                    self._ready[int(pid)] = state == "ready"


@contextmanager
def forked_workers(workers: int, url: str, model: Path, log: Path) -> Iterator[ForkedWorkers]:
    """So many workers, of one thread each, that serve `model` from the broker at `url`."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    serve = {"HETRAIN_BROKER_URL": url, "HETRAIN_MODELS": json.dumps([str(model)])}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.harness.forkserver", str(workers), str(log)],
        env=os.environ | one_thread | serve,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=tie_to_parent(),
    )
    pool = ForkedWorkers(server)
    try:
        pool.await_ready(workers)
        yield pool
    finally:
        pool.stop()


def main(count: int, log: str) -> None:
    """Keeps `count` workers running until it is killed, and they with it.

    The environment holds the broker and the model. Standard output gets a line ``start PID`` for every
    worker, and ``ready PID`` once it takes tasks.
    """
    from tasks.app import app

    app.loader.import_default_modules()
    for module in _MODULES:
        importlib.import_module(module)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, "a fork would lose the other threads, and what they had locked"
    tie = tie_to_parent()
    indices = {_fork(index, log, tie): index for index in range(count)}
    while True:
        pid, _ = os.wait()
        index = indices.pop(pid)
        indices[_fork(index, log, tie)] = index


def _fork(index: int, log: str, tie: Callable[[], None] | None) -> int:
    if pid := os.fork():
        _report(f"start {pid}")
        return pid
    try:
        os.setsid()
        if tie is not None:
            tie()
        _work(index, log)
    finally:
        traceback.print_exc()
        os._exit(1)


def _work(index: int, log: str) -> None:
    from tasks.app import app

    reports = os.dup(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signals.worker_ready.connect(lambda **_: os.write(reports, f"ready {os.getpid()}\n".encode()), weak=False)
    app.start(["worker", *_OPTIONS, "-n", f"worker-{index}@%h"])


def _report(line: str) -> None:
    os.write(1, f"{line}\n".encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
