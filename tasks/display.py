"""What Flower and `celery inspect` show of a worker beside Celery's own figures, and what they must not."""

from __future__ import annotations

from typing import Any

from celery import bootsteps
from celery.worker.request import Request

from hetrain.public.broker.connection import redacted
from hetrain.public.settings import WorkerSettings
from tasks.app import app
from tasks.intake.refusals import refusals


class SummarizedRequest(Request):
    """A task that is shown by its summary, never by its message."""

    def info(self, safe: bool = False) -> dict[str, Any]:
        """As Celery's, which by default contains the arguments themselves."""
        return dict(super().info(safe=True))


class Statistics(bootsteps.StartStopStep):
    """Corrects the worker's statistics: device and models stand first, the broker's password nowhere."""

    # Celery merges the steps' statistics in their order, so this one must follow the one that it corrects.
    requires = ("celery.worker.consumer.connection:Connection",)

    def __init__(self, parent: Any, **_: object) -> None:
        """There is nothing to start."""

    def info(self, parent: Any) -> dict[str, Any]:
        """The statistics' ``pool``, and their ``broker`` without the secrets of a URL."""
        from worker_gpu.service import service
        from worker_gpu.weights.store import available_models

        settings = WorkerSettings()
        # Lists, as Flower rewrites bare strings: "tiny-llama" becomes "Tiny llama".
        identity: dict[str, Any] = {"device": [service().description], "models": list(available_models())}
        if settings.shards is not None:
            identity["shards"] = [str(settings.shards)]
        connection = parent.connection.info() if parent.connection else {}
        broker = {name: connection.get(name) for name in ("transport", "virtual_host", "heartbeat")}
        return {
            "pool": identity | {"refused-messages": refusals.count} | dict(parent.pool.info),
            "broker": {"address": redacted(settings.broker_url)} | broker,
        }


app.steps["consumer"].add(Statistics)
