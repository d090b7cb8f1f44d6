"""Broker and workers for one machine, as one process tree.

Usage: ``python -m tasks.supervisor.embedded --model NAME``.

Prints one JSON line, ``{"url": ...}``, once the server answers, and ends server and workers when its standard
input ends (its parent closed it, or died) or on SIGTERM. When it gives up it prints ``{"error": ...}`` and
exits with 1.
Nothing but the log is written to disk; the socket lies in a directory that only this user can enter.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

from hetrain.public.disk import reason_of
from hetrain.public.errors import BrokerUnreachable, HetrainError
from tasks.supervisor.server import DEFAULT_MAXMEMORY, private_directory, start_server, start_worker
from tasks.supervisor.worker_process import SupervisedWorker, stop, threads_per_worker

_POLL_S = 0.2
_LOG_BYTES = 16 << 20


def supervise(
    model: str, workers: int, concurrency: int, maxmemory: int, directory: Path, log: IO[bytes]
) -> None:
    """Runs server and workers until standard input ends. Raises `HetrainError` when it has to give up."""
    server, url = start_server(directory, log, maxmemory=maxmemory)
    threads = threads_per_worker(workers * concurrency)

    def starter(index: int) -> Callable[[int], subprocess.Popen[bytes]]:
        return lambda ready: start_worker(
            index, url, model, log, threads=threads, concurrency=concurrency, ready=ready
        )

    supervised = [SupervisedWorker(starter(index + 1)) for index in range(workers)]
    try:
        _print_message({"url": url})
        while not _stdin_ended(_POLL_S):
            if server.poll() is not None:
                raise BrokerUnreachable(
                    f"the embedded broker died (exit status {server.returncode})", hint="see its log"
                )
            for worker in supervised:
                worker.ensure_running()
            trim_log(Path(log.name), _LOG_BYTES)
    finally:
        stop([worker.process for worker in supervised if worker.process is not None])
        stop([server])


def trim_log(path: Path, limit: int) -> None:
    """Cuts a log of more than `limit` bytes to whole lines of its newer half.

    Its writers must append. What they write at this very moment may be lost; what stays is in order.
    """
    with suppress(OSError), path.open("r+b") as log:
        size = os.fstat(log.fileno()).st_size
        if size <= limit:
            return
        log.seek(size - limit // 2)
        kept = b"(older lines were removed)\n" + log.read().partition(b"\n")[2]
        # Truncated last: a line that is appended between the two calls is cut off, never before older ones.
        log.seek(0)
        log.write(kept)
        log.truncate()


def _stdin_ended(wait_s: float) -> bool:
    readable, _, _ = select.select([0], [], [], wait_s)
    return bool(readable) and not os.read(0, 4096)


def _print_message(message: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _end(*_: object) -> None:
    raise SystemExit(0)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.supervisor.embedded", description="Broker and workers for one machine"
    )
    parser.add_argument(
        "--model", required=True, help="name or path of the model to serve (see HETRAIN_MODELS)"
    )
    parser.add_argument("--workers", type=int, default=1, help="number of worker processes")
    parser.add_argument("--concurrency", type=int, default=1, help="tasks that each of them runs at once")
    parser.add_argument("--maxmemory", type=int, default=DEFAULT_MAXMEMORY, help="bytes the broker may hold")
    parser.add_argument("--log-file", type=Path, help="where broker and workers write; kept afterwards")
    options = parser.parse_args()
    if min(options.workers, options.concurrency, options.maxmemory) < 1:
        parser.error("--workers, --concurrency and --maxmemory must be positive")
    # Ctrl-C and a terminal's end reach the whole foreground group, but the client decides when to stop.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    with ExitStack() as stack:
        try:
            directory = private_directory()
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            log = stack.enter_context(open(options.log_file or directory / "log", "ab"))
            supervise(options.model, options.workers, options.concurrency, options.maxmemory, directory, log)
        except HetrainError as error:
            _print_message({"error": str(error)})
            return 1
        except OSError as error:
            _print_message({"error": f"{error.filename or 'a file'} cannot be used: {reason_of(error)}"})
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
