"""An embedded broker and workers on this machine, which run for the length of a block."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from urllib.parse import urlsplit

from hetrain.public.disk import reason_of
from hetrain.public.errors import HetrainError, StorageError, WorkerError
from hetrain.public.settings import variable
from hetrain.public.system import child_environment

_START_S = 60.0
_STOP_S = 15.0
_TAIL_BYTES = 2000
_LINE_LIMIT = 8192


class Embedded:
    """A running supervisor (``python -m tasks.supervisor.embedded``).

    Attributes:
        url: the broker's address, with its password.
        log_file: the output of broker and workers.
    """

    def __init__(self, process: subprocess.Popen[bytes], log_file: Path, url: str) -> None:
        self._process = process
        self.log_file = log_file
        self.url = url
        self._failure: HetrainError | None = None
        self._lock = threading.Lock()

    def failure(self) -> HetrainError | None:
        """Why broker and workers have ended, None while they run. Thread-safe."""
        with self._lock:
            if self._failure is None and self._process.poll() is not None:
                self._failure = _failure(self._process, self.log_file)
            return self._failure


@contextmanager
def start_embedded(
    model: str, log_file: Path, *, workers: int = 1, concurrency: int = 1, maxmemory: int | None = None
) -> Iterator[Embedded]:
    """Starts a broker and workers that serve `model`, and ends them when the block ends.

    They also end when this process ends in any way. Workers may still be loading when the block begins.

    Args:
        model: name or path of a model, as in HETRAIN_MODELS.
        log_file: their output; kept afterwards.
        workers: number of worker processes.
        concurrency: tasks that each of them runs at once; they share the cores.
        maxmemory: bytes the broker may hold; None takes the supervisor's default.

    Raises:
        WorkerError: they do not start; with the end of the log.
        StorageError: the log cannot be written.
    """
    command = [sys.executable, "-m", "tasks.supervisor.embedded", "--model", model, "--workers", str(workers)]
    command += ["--concurrency", str(concurrency), "--log-file", str(log_file)]
    if maxmemory is not None:
        command += ["--maxmemory", str(maxmemory)]
    environment = child_environment() | {variable("broker_url"): ""}
    try:
        log = open(log_file, "ab")  # noqa: SIM115
    except OSError as error:
        raise StorageError(
            f"the log cannot be written: {reason_of(error)}",
            where=str(log_file),
            hint="make room on this disk",
        ) from error
    with log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment
        )
    url = ""
    try:
        url = _await_url(process, log_file)
        yield Embedded(process, log_file, url)
    finally:
        _end(process, url)


def _await_url(process: subprocess.Popen[bytes], log_file: Path) -> str:
    """The ``url`` in the supervisor's first line. Raises `WorkerError` for an ``error``, or no line."""
    assert process.stdout is not None
    descriptor, line, end = process.stdout.fileno(), b"", monotonic() + _START_S
    while b"\n" not in line:
        readable, _, _ = select.select([descriptor], [], [], max(0.0, end - monotonic()))
        data = os.read(descriptor, _LINE_LIMIT) if readable else b""
        if not data:
            raise _failure(process, log_file)
        line += data
    message: dict[str, str] = json.loads(line.partition(b"\n")[0])
    if "error" in message:
        raise WorkerError(message["error"], where=str(log_file))
    return message["url"]


def _failure(process: subprocess.Popen[bytes], log_file: Path) -> HetrainError:
    reason = ""
    if process.poll() is not None and process.stdout is not None and not process.stdout.closed:
        errors = [line for line in process.stdout.read().splitlines() if b'"error"' in line]
        reason = f": {json.loads(errors[-1])['error']}" if errors else ""
    return WorkerError(
        f"the embedded broker and workers have ended{reason}", where=str(log_file), hint=_tail(log_file)
    )


def _tail(log_file: Path) -> str:
    try:
        with open(log_file, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - _TAIL_BYTES))
            text = log.read().decode(errors="replace").strip()
    except OSError:
        return "there is no log"
    return f"the log ends with:\n{text}" if text else "the log is empty"


def _end(process: subprocess.Popen[bytes], url: str) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    directory = Path(urlsplit(url).path).parent
    if url and directory.name.startswith("hetrain-"):
        shutil.rmtree(directory, ignore_errors=True)  # a supervisor that was killed leaves it behind
