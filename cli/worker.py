"""`hetrain worker`: the workers of one machine. Becomes their supervisor, which is no part of the client."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

Models = Annotated[
    str | None,
    typer.Option(
        "--models",
        help="What to serve: aliases, directories, hub ids or label=path, comma-separated; by default "
        "HETRAIN_MODELS, or smollm2-135m.",
        show_default=False,
    ),
]
BrokerUrl = Annotated[
    str | None,
    typer.Option(
        "--broker-url",
        help="Redis or Valkey to take tasks from; by default HETRAIN_BROKER_URL, or redis://localhost:6379/0.",
        show_default=False,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Processes; by default one per visible GPU.", show_default=False),
]
Concurrency = Annotated[
    int | None,
    typer.Option("--concurrency", min=1, help="Tasks that each runs at once.", show_default="1"),
]
Shards = Annotated[
    str | None,
    typer.Option(
        "--shards",
        metavar="FIRST-LAST/COUNT",
        help="Serve this part of every model alone, such as 0-7/32, from a queue of its own.",
        show_default="whole models",
    ),
]
WeightsBytes = Annotated[
    str | None,
    typer.Option(
        "--weights-bytes",
        metavar="SIZE",
        help="Weights that each holds at once, such as 20GB; the least recently used make room.",
        show_default="3/4 of a GPU's memory, no limit on a CPU",
    ),
]


def worker(
    models: Models = None,
    broker_url: BrokerUrl = None,
    workers: Workers = None,
    concurrency: Concurrency = None,
    shards: Shards = None,
    weights_bytes: WeightsBytes = None,
) -> None:
    """Serve jobs on this machine, with one worker process per GPU.

    Ctrl-C (or SIGTERM) once finishes running tasks, twice ends now.
    """
    from hetrain.public.broker.connection import parse_broker_url
    from hetrain.public.protocol.registration import ShardRange
    from hetrain.public.system import child_environment

    given = {
        "HETRAIN_MODELS": models,
        "HETRAIN_BROKER_URL": broker_url,
        "HETRAIN_WORKER_CONCURRENCY": concurrency,
        "HETRAIN_SHARDS": shards,
        "HETRAIN_WEIGHTS_BYTES": weights_bytes,
    }
    # Through the environment: arguments, with the broker's password in them, would be there for all to see.
    environment = child_environment() | {
        name: str(value) for name, value in given.items() if value is not None
    }
    if url := environment.get("HETRAIN_BROKER_URL"):
        parse_broker_url(url)
    if text := environment.get("HETRAIN_SHARDS"):
        ShardRange.parse(text)
    command = [sys.executable, "-m", "tasks.supervisor.multi_gpu"]
    if workers is not None:
        command += ["--workers", str(workers)]
    os.execve(sys.executable, command, environment)
