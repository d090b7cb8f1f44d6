"""The two tasks of a worker: prepare a job, and evaluate a product.

A task's only argument is a message of `hetrain.public.protocol.messages`. Message and blobs are hostile until
checked. The outcome of a request is pushed to its job's done-list; Celery's own result backend is not used.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

from celery import Task

from hetrain.public.broker.blobs import BlobStore
from hetrain.public.errors import HetrainError, WireError
from hetrain.public.protocol.messages import (
    MAX_BLOB_BYTES,
    TASK_EVALUATE,
    TASK_PREPARE,
    Blob,
    EvaluateTask,
    PrepareTask,
)
from hetrain.public.protocol.plan import MAX_PLAN_BYTES
from tasks.app import app
from tasks.run import TaskOutput, run

_REQUEST = "tasks.display:SummarizedRequest"


@app.task(name=TASK_PREPARE, bind=True, throws=(HetrainError,), Request=_REQUEST)
def prepare(self: Task[Any, Any], message: str) -> str:
    """Loads a job's plan and matrices. Argument: a `PrepareTask` as JSON. Returns a line for Flower."""
    return run(PrepareTask, message, _prepare, _worker_name(self))


@app.task(name=TASK_EVALUATE, bind=True, throws=(HetrainError,), Request=_REQUEST)
def evaluate(self: Task[Any, Any], message: str) -> str:
    """Multiplies a blob's ciphertexts by rows of a public matrix. Argument: an `EvaluateTask` as JSON.

    Returns a line for Flower.
    """
    return run(EvaluateTask, message, _evaluate, _worker_name(self))


def _worker_name(task: Task[Any, Any]) -> str:
    return str(task.request.hostname)[:200]


def _prepare(task: PrepareTask, store: BlobStore) -> TaskOutput:
    from worker_gpu.service import service

    started_at = perf_counter()
    service().prepare(task, _plan_loader(task, store))
    return None, perf_counter() - started_at


def _evaluate(task: EvaluateTask, store: BlobStore) -> TaskOutput:
    from worker_gpu.service import service

    load_plan = _plan_loader(task, store)
    service().check(task, load_plan)
    payload = _load(store, task.input, task.job, "in", MAX_BLOB_BYTES)
    started_at = perf_counter()
    parts = service().evaluate(task, load_plan, payload)
    return parts, perf_counter() - started_at


def _plan_loader(task: PrepareTask | EvaluateTask, store: BlobStore) -> Callable[[], bytes]:
    return lambda: bytes(_load(store, task.plan, task.job, "plan", MAX_PLAN_BYTES))


def _load(store: BlobStore, blob: Blob, job: str, kind: str, limit: int) -> memoryview:
    if blob.job != job or blob.kind != kind:
        raise WireError(f"the task's {kind} blob belongs to another job or has another kind", where=blob.key)
    return store.get(blob, limit=limit)
