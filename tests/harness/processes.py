"""A broker of one's own, and the `hetrain` command as users run it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tasks.supervisor.server import DEFAULT_MAXMEMORY, private_directory, start_server, stop

HETRAIN = (sys.executable, "-m", "cli")


@dataclass(frozen=True)
class Serving:
    """A broker's URL, the private directory that it lives in, and its log, open for others to write to."""

    url: str
    directory: Path
    log: IO[bytes]


@contextmanager
def serving(*, maxmemory: int = DEFAULT_MAXMEMORY) -> Iterator[Serving]:
    """A broker without workers, for as long as the context lasts."""
    with ExitStack() as stack:
        directory = private_directory()
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        log = stack.enter_context((directory / "log").open("wb"))
        server, url = start_server(directory, log, maxmemory=maxmemory)
        stack.callback(stop, [server])
        yield Serving(url, directory, log)


def hetrain(*arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end, whatever broker this process was told of."""
    environment = {name: value for name, value in os.environ.items() if name != "HETRAIN_BROKER_URL"}
    return subprocess.run(
        [*HETRAIN, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, env=environment
    )
