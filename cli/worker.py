"""`hetrain worker`: becomes the supervisor of one machine's workers, which is no part of the client."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

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
        help="Serve only this part of every model, such as 0-7/32, from a queue of its own.",
        show_default="whole models",
    ),
]
WeightsBytes = Annotated[
    str | None,
    typer.Option(
        "--weights-bytes",
        metavar="SIZE",
        help="Weights that each holds at once, such as 20GB; the least recently used are dropped for others.",
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
    from hetrain.public.settings import WorkerSettings, variable
    from hetrain.public.system import child_environment

    options: dict[str, Any] = {
        "models": models,
        "broker_url": broker_url,
        "worker_concurrency": concurrency,
        "shards": shards,
        "weights_bytes": weights_bytes,
    }
    given = {field: value for field, value in options.items() if value is not None}
    WorkerSettings(**given)  # before the workers would find out
    # By the environment: every user of the machine can read arguments, and the URL holds a password.
    environment = child_environment() | {variable(field): str(value) for field, value in given.items()}
    command = [sys.executable, "-m", "tasks.supervisor.multi_gpu"]
    if workers is not None:
        command += ["--workers", str(workers)]
    os.execve(sys.executable, command, environment)
