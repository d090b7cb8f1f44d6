"""What a worker says of itself, as a remote control command: what `hetrain doctor` shows.

The thread that takes tasks answers it, so it must not wait for an engine that is slow to open.
"""

from __future__ import annotations

import functools
import logging
import socket
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.worker.control import inspect_command

import hetrain
from hetrain.public.errors import HetrainError
from hetrain.public.protocol.messages import CONTROL_ABOUT, EngineReport, WorkerReport

_PATIENCE_S = 0.5
_LINE, _PARAGRAPH = 200, 1000

logger = logging.getLogger(__name__)


@inspect_command(name=CONTROL_ABOUT)
def about(state: Any) -> dict[str, Any]:
    """What this worker computes on, and what it serves."""
    from worker_gpu.weights.shards import served_shards
    from worker_gpu.weights.store import served_models

    consumer = state.consumer
    # Service and device belong to the forked processes; the parent must not touch CUDA.
    forked = isinstance(consumer.pool, PreforkPool)
    report = WorkerReport(
        worker=plain_line(state.hostname),
        hostname=plain_line(socket.gethostname()),
        hetrain=hetrain.__version__,
        device="" if forked else plain_line(_service().description),
        engines=[] if forked else _engines(),
        models=[plain_line(label) for label in served_models()],
        shards=str(served_shards() or ""),
        queues=[plain_line(queue.name) for queue in consumer.task_consumer.queues],
        concurrency=consumer.controller.concurrency,
    )
    return report.model_dump(mode="json")


def _service() -> Any:
    from worker_gpu.service import service

    return service()


def _engines() -> list[EngineReport]:
    """One report per engine; those that are still being opened after a moment are reported as such."""
    looks = _looks()
    wait(looks.values(), timeout=_PATIENCE_S)
    return [
        look.result() if look.done() else EngineReport(name=name, state="opening")
        for name, look in looks.items()
    ]


@functools.cache
def _looks() -> dict[str, Future[EngineReport]]:
    """A look at every engine, begun on the first call: what comes of it holds as long as the process."""
    from worker_gpu.engines import ENGINES

    threads = ThreadPoolExecutor(len(ENGINES), thread_name_prefix="hetrain-about")
    return {name: threads.submit(_look, name) for name in ENGINES}


def _look(name: str) -> EngineReport:
    try:
        description = _service().engine(name).description
    except HetrainError as error:
        return EngineReport(name=name, state="refused", about=_plain(str(error), _PARAGRAPH))
    except Exception as error:
        logger.exception("engine %s cannot be opened", name)
        reason = f"cannot be opened ({type(error).__name__}: {error}); the worker's log has the traceback"
        return EngineReport(name=name, state="refused", about=_plain(reason, _PARAGRAPH))
    return EngineReport(name=name, state="ready", about=_plain(description, _PARAGRAPH))


def plain_line(text: str) -> str:
    """`text` as a `Line` of a message."""
    return _plain(text, _LINE)


def _plain(text: str, limit: int) -> str:
    return "".join(char if char.isprintable() else " " for char in text)[:limit]
