"""The remote control command that reports what a worker computes on and serves, for `hetrain doctor`.

The thread that takes tasks answers it, so it must not wait for an engine that is slow to open.
"""

from __future__ import annotations

import functools
import logging
import socket
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from celery.worker.control import inspect_command

import hetrain
from hetrain.public.errors import HetrainError
from hetrain.public.protocol.messages import CONTROL_REPORT, EngineReport, WorkerReport
from hetrain.public.settings import WorkerSettings

_OPENING_TIMEOUT_S = 0.5
_LINE, _PARAGRAPH = 200, 1000

logger = logging.getLogger(__name__)


@inspect_command(name=CONTROL_REPORT)
def report(state: Any) -> dict[str, Any]:
    """This worker's `WorkerReport`, as JSON types."""
    from worker_gpu.service import service
    from worker_gpu.weights.store import available_models

    consumer = state.consumer
    return WorkerReport(
        worker=plain_line(state.hostname),
        hostname=plain_line(socket.gethostname()),
        hetrain=hetrain.__version__,
        device=plain_line(service().description),
        engines=_engine_reports(),
        models=[plain_line(label) for label in available_models()],
        shards=str(WorkerSettings().shards or ""),
        queues=[plain_line(queue) for queue in _without_lanes(consumer.task_consumer.queues)],
        concurrency=consumer.controller.concurrency,
    ).model_dump(mode="json")


def _without_lanes(queues: Iterable[Any]) -> list[str]:
    """Names of queues but those that another one's name begins, which are its lanes."""
    names = sorted(queue.name for queue in queues)
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _engine_reports() -> list[EngineReport]:
    """One report per engine; those that are still being opened after a moment are reported as such."""
    reports = _pending_reports()
    wait(reports.values(), timeout=_OPENING_TIMEOUT_S)
    return [
        pending.result() if pending.done() else EngineReport(name=name, state="opening")
        for name, pending in reports.items()
    ]


@functools.cache
def _pending_reports() -> dict[str, Future[EngineReport]]:
    """Opens every engine on the first call: the outcome holds for the life of the process."""
    from worker_gpu.engines import ENGINES

    threads = ThreadPoolExecutor(len(ENGINES), thread_name_prefix="hetrain-engines")
    return {name: threads.submit(_engine_report, name) for name in ENGINES}


def _engine_report(name: str) -> EngineReport:
    from worker_gpu.service import service

    try:
        description = service().engine(name).description
    except HetrainError as error:
        return EngineReport(name=name, state="refused", description=_plain(str(error), _PARAGRAPH))
    except Exception as error:
        logger.exception("engine %s cannot be opened", name)
        reason = f"cannot be opened ({type(error).__name__}: {error}); the worker's log has the traceback"
        return EngineReport(name=name, state="refused", description=_plain(reason, _PARAGRAPH))
    return EngineReport(name=name, state="ready", description=_plain(description, _PARAGRAPH))


def plain_line(text: str) -> str:
    """`text` as a `Line` of a message."""
    return _plain(text, _LINE)


def _plain(text: str, limit: int) -> str:
    return "".join(char if char.isprintable() else " " for char in text)[:limit]
