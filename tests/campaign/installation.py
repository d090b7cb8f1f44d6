"""What the rounds share, and keep warm: broker, workers, relays before them, a small disk, a clock."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO
from unittest.mock import patch

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from hetrain.public.broker.connection import parse_broker_url
from tasks.supervisor.server import DEFAULT_MAXMEMORY, private_directory, start_server
from tasks.supervisor.worker_process import stop
from tests.harness.forkserver import ForkedWorkers, forked_workers
from tests.harness.processes import HANDBOOK
from tests.harness.relay import Relay
from tests.harness.small_disk import SmallDisk, small_disk
from tests.harness.tiny_model import save_tiny_model

WORKERS = 2
_DISK_BYTES = 24 << 20
_LIBRARIES = (Path("/usr/lib"), Path("/usr/local/lib"))


def find_faketime() -> Path | None:
    """libfaketime: where `HETRAIN_FAKETIME` says, or where a distribution installs it."""
    if named := os.environ.get("HETRAIN_FAKETIME"):
        return Path(named)
    found = (path for root in _LIBRARIES for path in root.glob("**/faketime/libfaketime.so.1"))
    return next(found, None)


class BrokerClock:
    """The broker's wall clock, by which all keys expire. It can be moved where libfaketime is there.

    A broker has this clock if it was started with its environment variables.
    Those of workers and clients cannot: Python's `time.sleep` fails under libfaketime 0.9.10. They time
    everything by monotonic clocks.
    """

    def __init__(self, directory: Path) -> None:
        self.library = find_faketime()
        self._path = directory / "clock"
        self._offset_s = 0
        self.move(0)

    def move(self, seconds: int) -> None:
        """Moves it so many seconds forward, or back where they are negative."""
        self._offset_s += seconds
        new = self._path.with_suffix(".new")
        new.write_text(f"{self._offset_s:+d}")
        new.replace(self._path)

    def environment(self) -> dict[str, str]:
        """Variables of a broker's process."""
        if self.library is None:
            return {}
        return {
            "LD_PRELOAD": str(self.library),
            "FAKETIME_TIMESTAMP_FILE": str(self._path),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }


class Broker:
    """A broker that can be started again, empty, at the same address. Call it from the main thread.

    Attributes:
        pid: its process id.
        admin: a client of it that passes no relay.
    """

    def __init__(self, directory: Path, log: IO[bytes]) -> None:
        self._directory, self._log = directory, log
        self._environment: Mapping[str, str] = {}
        self._password = secrets.token_urlsafe(24)
        self.start()
        address = parse_broker_url(self.url_at(directory / "broker.sock")).for_redis()
        # Again at once, on a new connection: the broker may have been started again.
        self.admin: redis.Redis = redis.Redis.from_url(address, retry=Retry(NoBackoff(), 1))

    def url_at(self, path: Path) -> str:
        """Its address through a socket at `path`."""
        return f"redis+socket://:{self._password}@{path}"

    def replace(self, environment: Mapping[str, str]) -> None:
        """Starts an empty one in its place, which has these environment variables, too."""
        self._environment = environment
        self.kill()
        self.start()

    def start(self) -> None:
        """Starts it."""
        with patch.dict(os.environ, self._environment):
            self._process, _ = start_server(self._directory, self._log, password=self._password)
        self.pid = self._process.pid

    def kill(self) -> None:
        """Kills it; what it holds is gone."""
        stop([self._process], grace_s=0)

    def limit_memory(self, spare: int | None) -> None:
        """Lowers its limit to `spare` bytes more than it holds; None restores it."""
        limit = DEFAULT_MAXMEMORY
        if spare is not None:
            limit = int(self.admin.info("memory")["used_memory"]) + spare
        self.admin.config_set("maxmemory", limit)


class Installation:
    """Broker, workers, relays, disk and clock.

    Attributes:
        model: the directory of a tiny model.
        hints: the directory of the client's hints.
    """

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self.model, self.cache = directory / "tiny", directory / "cache"
        self.hints = self.cache / "hints"
        save_tiny_model(self.model, HANDBOOK.read_text())
        self.cache.mkdir()
        self.clock = BrokerClock(directory)
        self.disk: SmallDisk = stack.enter_context(small_disk(directory / "disk", _DISK_BYTES))
        log = stack.enter_context((directory / "broker.log").open("wb"))
        self.broker = Broker(directory, log)
        stack.callback(self.broker.kill)
        self.relays: dict[str, Relay] = {}
        for party in ("worker", "client"):
            self.relays[party] = Relay(directory / f"{party}.sock", directory / "broker.sock")
            stack.callback(self.relays[party].close)
        with patch.dict(os.environ, HETRAIN_CACHE=str(self.cache)):
            url = self.broker.url_at(directory / "worker.sock")
            self.workers: ForkedWorkers = stack.enter_context(
                forked_workers(WORKERS, url, self.model, directory / "workers.log")
            )

    def client_environment(self) -> dict[str, str]:
        """Environment variables of a client."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HETRAIN_")}
        return kept | {
            "HETRAIN_BROKER_URL": self.broker.url_at(self.directory / "client.sock"),
            "HETRAIN_CACHE": str(self.cache),
            "HETRAIN_STATE": str(self.directory / "state"),
            "HETRAIN_DISK_WAIT_S": "30",
        }


@contextmanager
def installation() -> Iterator[Installation]:
    """An installation, until the context ends."""
    with ExitStack() as stack:
        # Tiny matrices are slower on several threads.
        stack.enter_context(patch.dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"))
        directory = private_directory()
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        yield Installation(directory, stack)
