"""A broker for one test or module, and the `hetrain` command as users run it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import redis

from hetrain.public.broker.connection import parse_broker_url
from tasks.supervisor.server import DEFAULT_MAXMEMORY, private_directory, start_server, start_worker, stop

HETRAIN = (sys.executable, "-m", "cli")
HANDBOOK = Path(__file__).resolve().parents[2] / "examples" / "handbook.jsonl"


@dataclass(frozen=True)
class BrokerServer:
    """A broker's URL and process, its private directory, and its log, open for workers to write to."""

    url: str
    process: subprocess.Popen[bytes]
    directory: Path
    log: IO[bytes]

    def connect(self) -> redis.Redis:
        """A new client of this broker."""
        return connect(self.url)


def connect(url: str) -> redis.Redis:
    """A new client of the broker at `url`."""
    return redis.Redis.from_url(parse_broker_url(url).for_redis())


@contextmanager
def broker_server(*, maxmemory: int = DEFAULT_MAXMEMORY, password: str = "") -> Iterator[BrokerServer]:
    """A broker without workers, until the context ends."""
    with ExitStack() as stack:
        directory = private_directory()
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        log = stack.enter_context((directory / "log").open("wb"))
        server, url = start_server(directory, log, maxmemory=maxmemory, password=password)
        stack.callback(stop, [server])
        yield BrokerServer(url, server, directory, log)


@contextmanager
def broker_with_worker(model: str | Path, *, threads: int = 0) -> Iterator[BrokerServer]:
    """A broker with one worker that serves `model`, until the context ends."""
    with broker_server() as broker, ExitStack() as stack:
        worker = start_worker(1, broker.url, str(model), broker.log, threads=threads)
        stack.callback(stop, [worker])
        yield broker


def hetrain(
    *arguments: object, timeout: float = 240, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end, in a process of its own.

    Args:
        arguments: of the command.
        timeout: seconds after which it is killed and `subprocess.TimeoutExpired` is raised.
        environment: by default that of this process without the broker's URL.
    """
    from tests.harness.cli_process import run_forked

    if environment is None:
        environment = {name: value for name, value in os.environ.items() if name != "HETRAIN_BROKER_URL"}
    return run_forked(arguments, timeout, environment)
