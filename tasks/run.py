"""Running one request: whether it is still wanted, its lease, its start, its result, its end."""

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
    Completion,
    EvaluateTask,
    Failure,
    PrepareTask,
    Token,
    new_token,
    parse,
)
from tasks.app import broker_url
from tasks.leases import Leases
from tasks.request_log import RequestLog

logger = logging.getLogger(__name__)

M = TypeVar("M", PrepareTask, EvaluateTask)
TaskOutput = tuple[Sequence[memoryview] | None, float]
"""The result's parts, None where there is no result, and the seconds of computing."""
Work = Callable[[M, BlobStore], TaskOutput]
_SKIPPED = "no result: finished, given up or running elsewhere"


class WorkerContext:
    """A worker process's connections: blobs, ledger, leases."""

    def __init__(self, url: str) -> None:
        self.store = BlobStore(url)
        self.request_log = RequestLog(url, self.store)
        owner = f"{socket.gethostname()}:{os.getpid()}:{new_token()[:8]}"
        self.leases = Leases(url, self.store.client, owner)


@functools.cache
def worker_context() -> WorkerContext:
    """The process's desk, opened at the first task."""
    return WorkerContext(broker_url())


class _Address(BaseModel):
    """Where to report that a message is malformed."""

    model_config = ConfigDict(extra="ignore", strict=True)

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
    tools = worker_context()
    if not tools.request_log.is_wanted(task.job, task.request):
        return _SKIPPED
    with tools.leases.held(keys.lease(task.job, task.request)) as mine:
        completion, error = _attempt(tools, worker, task, work) if mine else (None, None)
    if completion is not None:
        _report(tools, task.job, completion)
    if error is not None:
        raise error
    return _SKIPPED if completion is None else f"{completion.seconds:.4f} s on {completion.device}"


def _report(tools: WorkerContext, job: str, completion: Completion) -> None:
    try:
        tools.request_log.end(job, completion)
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


def _attempt(
    tools: WorkerContext, worker: str, task: M, work: Work[M]
) -> tuple[Completion | None, HetrainError | None]:
    """What to report of a request's end, if anything, and the error it ended with, if any."""
    from worker_gpu.service import service

    report = functools.partial(
        Completion, request=task.request, worker=worker, device=service().describe(task.engine)[:200]
    )
    try:
        if tools.request_log.begin(task.job, report(state="started")) > keys.MAX_TRIES:
            raise TaskFailed(
                f"the task killed its worker {keys.MAX_TRIES} times",
                where=worker,
                hint="see the workers' logs",
            )
        parts, seconds = work(task, tools.store)
        if parts is None:
            return report(state="done", seconds=seconds), None
        # A client that has gone would leave the result behind.
        if not tools.request_log.is_wanted(task.job, task.request):
            return None, None
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
