"""`hetrain doctor`: whether a job can run, and on what."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.options import AsJson, option
from hetrain import api
from hetrain.config import JobSpec

if TYPE_CHECKING:
    from hetrain.public.broker.server_info import BrokerReport
    from hetrain.public.protocol.messages import WorkerReport

Model = Annotated[
    str | None,
    typer.Option(
        "--model-name-or-path",
        "-m",
        help="Say whether this model can be trained, and which workers have it.",
        show_default=False,
    ),
]
_MB = 1e6
_STATES = {
    "ready": "{name}: {description}",
    "refused": "{name}: refuses, {description}",
    "opening": "{name}: still opening, ask again",
}


def doctor(
    broker_url: Annotated[str | None, option(JobSpec, "workers")] = None,
    as_json: AsJson = False,
    model: Model = None,
) -> None:
    """Say at once whether this machine and the workers can run a job, and on what."""
    found = api.doctor(broker_url, model=model)
    if as_json:
        typer.echo(json.dumps(_report(found)))
    else:
        _print(found)
    if found.failure is not None:
        raise found.failure


def _report(found: api.DoctorReport) -> dict[str, object]:
    failure = found.failure
    return {
        "client": asdict(found.client),
        "model": found.model,
        "embedded": found.embedded,
        "broker": found.broker and asdict(found.broker),
        "workers": [worker.model_dump() for worker in found.workers],
        "runnable": [half.name for half in found.runnable],
        "warnings": list(found.warnings),
        "failure": failure
        and {"error": type(failure).__name__, "message": str(failure), "exit_code": failure.exit_code},
    }


def _print(found: api.DoctorReport) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for heading, lines in _sections(found):
        for line in lines:
            table.add_row(heading, Text(line))  # a Text: mark-up in foreign answers has no effect
            heading = ""
    console = Console()
    console.print(table)
    for warning in found.warnings:
        console.print(Text.assemble(("warning: ", "bold yellow"), warning), soft_wrap=True)


def _sections(found: api.DoctorReport) -> Iterator[tuple[str, list[str]]]:
    client = found.client
    versions = ", ".join(f"{name} {version}" for name, version in client.versions.items())
    engines = [
        f"{half.name}: {half.reason or ('usable' if half.hides else 'usable, hides nothing')}"
        for half in client.engines
    ]
    yield "client", [f"{versions}; {client.cores} cores; {client.kernels} kernels", *engines]
    yield "broker", _broker(found.broker, embedded=found.embedded)
    for worker in found.workers:
        yield "worker", _worker(worker)
    if found.failure is None:
        names = [half.name if half.hides else f"{half.name} (hides nothing)" for half in found.runnable]
        job = f"a job on {found.model}" if found.model else "a job"
        yield job, [f"can run with {' or '.join(names)}" if names else "no engine is there on both sides"]


def _broker(broker: BrokerReport | None, *, embedded: bool) -> list[str]:
    if broker is None:
        return ["not reached"]
    limit = f"{broker.maxmemory / _MB:,.0f} MB" if broker.maxmemory else "no known limit"
    used = "an unknown amount" if broker.used is None else f"{broker.used / _MB:,.1f} MB"
    origin = "embedded, for this check" if embedded else broker.where
    return [
        f"{broker.server or 'unknown server'}, {origin}; round trip {broker.round_trip_ms:.2f} ms",
        f"{used} used of {limit}, policy {broker.policy or 'unknown'}",
    ]


def _worker(worker: WorkerReport) -> list[str]:
    tasks = "1 task" if worker.concurrency == 1 else f"{worker.concurrency} tasks"
    shards = f"shards {worker.shards} of " if worker.shards else ""
    engines = [
        _STATES[engine.state].format(name=engine.name, description=engine.description)
        for engine in worker.engines
    ]
    return [
        f"{worker.worker} on {worker.hostname}, hetrain {worker.hetrain}, {tasks} at once",
        f"computes on {worker.device}",
        f"serves {shards}{', '.join(worker.models) or 'no model'}",
        *engines,
    ]
