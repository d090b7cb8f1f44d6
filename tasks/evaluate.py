"""The two tasks of a worker: get ready for a job, and multiply.

A task's only argument is a message of `hetrain.public.wire`. Message and blobs are hostile until checked.
What comes of a request is pushed to its job's done-list; Celery's own result backend is not used.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, TypeVar

from celery import Task

from hetrain.public import keys
from hetrain.public.blobs import BlobStore
from hetrain.public.errors import BrokerUnreachable, HetrainError, TaskFailed, WireError
from hetrain.public.wire import (
    MAX_BLOB_BYTES,
    TASK_EVALUATE,
    TASK_PREPARE,
    Blob,
    Completion,
    EvaluateTask,
    Failure,
    PrepareTask,
    new_token,
    parse,
)
from tasks.app import app, broker_url
from tasks.leases import Leases
from tasks.ledger import Ledger

_PLAN_LIMIT = 64 << 20
logger = logging.getLogger(__name__)

M = TypeVar("M", PrepareTask, EvaluateTask)
Outcome = tuple[Sequence[memoryview] | None, float]  # the result's parts, and the seconds of computing


class Desk:
    """A worker process's connections: blobs, ledger, leases."""

    def __init__(self, url: str) -> None:
        self.store = BlobStore(url)
        self.ledger = Ledger(url, self.store)
        self.leases = Leases(self.store.client, f"{socket.gethostname()}:{os.getpid()}:{new_token()[:8]}")


@functools.cache
def desk() -> Desk:
    """The process's desk, opened at the first task."""
    return Desk(broker_url())


@app.task(name=TASK_PREPARE, bind=True, throws=(HetrainError,))
def prepare(self: Task[Any, Any], message: str) -> None:
    """Loads a job's plan and matrices. Argument: a `PrepareTask` as JSON."""
    _run(self, parse(PrepareTask, message, where="task message"), _prepare)


@app.task(name=TASK_EVALUATE, bind=True, throws=(HetrainError,))
def evaluate(self: Task[Any, Any], message: str) -> None:
    """Multiplies a blob's ciphertexts by rows of a public matrix. Argument: an `EvaluateTask` as JSON."""
    _run(self, parse(EvaluateTask, message, where="task message"), _evaluate)


def _prepare(task: PrepareTask, store: BlobStore) -> Outcome:
    from worker_gpu.service import service

    begun = perf_counter()
    service().prepare(task, _plan_loader(task, store))
    return None, perf_counter() - begun


def _evaluate(task: EvaluateTask, store: BlobStore) -> Outcome:
    from worker_gpu.service import service

    payload = _load(store, task.input, task, "in", MAX_BLOB_BYTES)
    begun = perf_counter()
    parts = service().evaluate(task, _plan_loader(task, store), payload)
    return parts, perf_counter() - begun


def _plan_loader(task: PrepareTask | EvaluateTask, store: BlobStore) -> Callable[[], bytes]:
    return lambda: bytes(_load(store, task.plan, task, "plan", _PLAN_LIMIT))


def _load(
    store: BlobStore, blob: Blob, task: PrepareTask | EvaluateTask, kind: str, limit: int
) -> memoryview:
    if blob.job != task.job or blob.kind != kind:
        raise WireError(f"the task's {kind} blob belongs to something else", where=blob.key)
    return store.get(blob, limit=limit)


def _run(request: Task[Any, Any], task: M, work: Callable[[M, BlobStore], Outcome]) -> None:
    """Runs `work` unless the request is finished, given up or running elsewhere, and reports how it ended."""
    tools = desk()
    if not tools.ledger.is_wanted(task.job, task.request):
        return
    with tools.leases.held(keys.lease(task.job, task.request)) as mine:
        if not mine:
            return
        completion, error = _outcome(tools, str(request.request.hostname)[:200], task, work)
    tools.ledger.end(task.job, completion)
    if error is not None:
        raise error  # so that Celery's log and Flower show a failure


def _outcome(
    tools: Desk, worker: str, task: M, work: Callable[[M, BlobStore], Outcome]
) -> tuple[Completion, HetrainError | None]:
    from worker_gpu.service import service

    def report(**fields: Any) -> Completion:
        return Completion(request=task.request, worker=worker, device=service().description[:200], **fields)

    try:
        if tools.ledger.begin(task.job, report(state="started")) > keys.MAX_TRIES:
            raise TaskFailed(
                f"the task killed its worker {keys.MAX_TRIES} times",
                where=worker,
                hint="see the workers' logs",
            )
        parts, seconds = work(task, tools.store)
        output = None
        if parts is not None:
            output = tools.store.put(task.job, "out", keys.output_token(task.request), parts)
        return report(state="done", seconds=seconds, output=output), None
    except BrokerUnreachable:
        raise  # nobody to report to; the client sees the lease run out and asks again
    except HetrainError as error:
        return report(state="failed", failure=_failure(error)), error
    except Exception as error:
        logger.exception("request %s of job %s failed", task.request, task.job)
        failed = TaskFailed(
            f"{type(error).__name__}: {error}", where=worker, hint="the worker's log has the traceback"
        )
        return report(state="failed", failure=_failure(failed)), failed


def _failure(error: HetrainError) -> Failure:
    return Failure(
        error=type(error).__name__, what=error.what[:2000], where=error.where[:500], hint=error.hint[:2000]
    )
