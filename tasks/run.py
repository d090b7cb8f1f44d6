"""Runs one request: its lease and start, its result, its end."""

from __future__ import annotations

import functools
import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from hetrain.public.broker.blobs import BlobStore
from hetrain.public.errors import BrokerFull, BrokerUnreachable, HetrainError, TaskFailed, WireError
from hetrain.public.protocol import keys
from hetrain.public.protocol.messages import (
    Blob,
    Completion,
    EvaluateTask,
    Failure,
    PrepareTask,
    Token,
    new_token,
    parse,
)
from hetrain.public.settings import WorkerSettings
from tasks.app import broker_url
from tasks.leases import Leases
from tasks.request_log import RequestLog
from tasks.stall import running_tasks

logger = logging.getLogger(__name__)

M = TypeVar("M", PrepareTask, EvaluateTask)
TaskOutput = tuple[Sequence[memoryview] | None, float]
"""The result's parts, None where there is no result, and the seconds of computing."""
Work = Callable[[M, BlobStore], TaskOutput]
_SHARE_OF_LIMIT = 0.9
_SKIPPED = "no result: finished, given up or running elsewhere"


class WorkerContext:
    """A worker process's connections: blobs, request log, leases."""

    def __init__(self, url: str) -> None:
        self.store = BlobStore(url)
        owner = f"{socket.gethostname()}:{os.getpid()}:{new_token()[:8]}"
        self.request_log = RequestLog(url, self.store, owner)
        self.leases = Leases(self.store.client, owner)


@functools.cache
def worker_context() -> WorkerContext:
    """The process's context, opened at the first task."""
    return WorkerContext(broker_url())


class _Address(BaseModel):
    """Where to report that a message is malformed."""

    model_config = ConfigDict(extra="ignore", strict=True, hide_input_in_errors=True)

    job: Token
    request: Token


def run(kind: type[M], message: str, work: Work[M], worker: str) -> str:
    """Runs the request in `message`, and reports to its job how it ended.

    It is not run when it is finished, given up by its client, or running elsewhere.

    Args:
        kind: what the message must be.
        message: JSON, of unknown content.
        work: computes the result from the request and the blobs.
        worker: this worker's name.

    Returns:
        What Flower shows as its result: how long was computed, and on what.

    Raises:
        HetrainError: the request failed; this has been reported already, as far as that is possible.
    """
    try:
        task = parse(kind, message, where="task message")
    except WireError as malformed:
        _report_malformed(message, worker, malformed)
        raise
    with running_tasks.noted(_limit_s(task)):
        return _run(task, work, worker)


def _limit_s(task: PrepareTask | EvaluateTask) -> float:
    """Less than its client waits, so that another run may still serve it."""
    longest = keys.PREPARE_LIMIT_S if isinstance(task, PrepareTask) else keys.RUN_LIMIT_S
    return _stall_s() or _SHARE_OF_LIMIT * longest


@functools.cache
def _stall_s() -> float | None:
    return WorkerSettings().stall_s


def _run(task: M, work: Work[M], worker: str) -> str:
    from worker_gpu.service import service

    context = worker_context()
    report = functools.partial(
        Completion, request=task.request, worker=worker, device=service().describe(task.engine)[:200]
    )
    tries = context.request_log.begin(task.job, report(state="started"))
    if not tries:
        return _SKIPPED
    with context.leases.renewed(keys.lease(task.job, task.request)) as end_lease:
        completion, parts, error = _attempt(task, tries, functools.partial(work, task, context.store), report)
        end_lease()
        _report(context, task.job, completion, parts)
    if error is not None:
        raise error
    return f"{completion.seconds:.4f} s on {completion.device}"


def _attempt(
    task: PrepareTask | EvaluateTask,
    tries: int,
    work: Callable[[], TaskOutput],
    report: Callable[..., Completion],
) -> tuple[Completion, Sequence[memoryview] | None, HetrainError | None]:
    """What to report of a request's end, the result's parts, and the error it ended with, if any."""
    worker = report(state="started").worker
    try:
        if tries > keys.MAX_TRIES:
            raise TaskFailed(
                f"the task killed its worker {keys.MAX_TRIES} times",
                where=worker,
                hint="see the workers' logs",
            )
        parts, seconds = work()
    except BrokerUnreachable:
        raise  # no report can be sent; the client sees the lease run out and asks again
    except HetrainError as error:
        return report(state="failed", failure=_failure(error)), None, error
    except Exception as error:
        logger.exception("request %s of job %s failed", task.request, task.job)
        failed = TaskFailed(
            f"{type(error).__name__}: {error}", where=worker, hint="the worker's log has the traceback"
        )
        return report(state="failed", failure=_failure(failed)), None, failed
    output = None if parts is None else _output(task, worker, parts)
    return report(state="done", seconds=seconds, output=output), parts, None


def _output(task: PrepareTask | EvaluateTask, worker: str, parts: Sequence[memoryview]) -> Blob:
    """Where `worker`'s result of `task` will lie."""
    nbytes = sum(memoryview(part).nbytes for part in parts)
    return Blob(job=task.job, kind="out", token=keys.output_token(task.request, worker), nbytes=nbytes)


def _report(
    context: WorkerContext, job: str, completion: Completion, parts: Sequence[memoryview] | None = None
) -> None:
    try:
        context.request_log.end(job, completion, parts)
    except BrokerFull as error:
        # The lease runs out, so a client that is still there will ask again.
        logger.warning(
            "request %s of job %s: state %r cannot be reported, as the broker stays out of memory (%s)",
            completion.request,
            job,
            completion.state,
            error.where,
        )
        raise


def _report_malformed(message: str, worker: str, error: WireError) -> None:
    try:
        address = parse(_Address, message, where="task message")
    except WireError:
        return
    failed = Completion(request=address.request, worker=worker, state="failed", failure=_failure(error))
    _report(worker_context(), address.job, failed)


def _failure(error: HetrainError) -> Failure:
    return Failure(
        error=type(error).__name__, what=error.what[:2000], where=error.where[:500], hint=error.hint[:2000]
    )
