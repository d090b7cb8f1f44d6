"""What Flower and `celery inspect` show of a worker beside Celery's own figures, and what they must not."""

from __future__ import annotations

from typing import Any

from celery import bootsteps
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.worker.request import Request

from hetrain.public.broker.connection import redacted
from tasks.app import app, broker_url


class SummarizedRequest(Request):
    """A task that is shown by its summary, never by its message."""

    def info(self, safe: bool = False) -> dict[str, Any]:
        """As Celery's, which by default tells the arguments themselves."""
        return dict(super().info(safe=True))


class Statistics(bootsteps.StartStopStep):
    """Corrects the worker's statistics: device and models stand first, the broker's password nowhere."""

    # Celery merges what the steps say in their order, so this one must come after the one that it corrects.
    requires = ("celery.worker.consumer.connection:Connection",)

    def __init__(self, parent: Any, **_: object) -> None:
        """There is nothing to start."""

    def info(self, parent: Any) -> dict[str, Any]:
        """The statistics' ``pool``, and their ``broker`` without what a URL may hold of secrets."""
        from worker_gpu.weights.shards import served_shards
        from worker_gpu.weights.store import served_models

        # Lists, as Flower rewrites bare strings: "tiny-llama" becomes "Tiny llama".
        identity = {"device": [_device(parent.pool)], "models": list(served_models())}
        if (shards := served_shards()) is not None:
            identity["shards"] = [str(shards)]
        connection = parent.connection.info() if parent.connection else {}
        broker = {name: connection.get(name) for name in ("transport", "virtual_host", "heartbeat")}
        return {
            "pool": identity | dict(parent.pool.info),
            "broker": {"address": redacted(broker_url())} | broker,
        }


def _device(pool: Any) -> str:
    if isinstance(pool, PreforkPool):
        # The parent must not touch CUDA.
        return "chosen by each forked process, see the results of its tasks"
    from worker_gpu.service import service

    return service().description


app.steps["consumer"].add(Statistics)
