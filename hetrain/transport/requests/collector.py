"""The collector: one thread that receives all workers' completions of a job and settles its requests.

It pops `Completion` messages from the job's done-list, and runs a tick of the `RecoveryLoop` every second.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from time import monotonic, sleep

from hetrain.public.errors import (
    BlobMissing,
    BrokerError,
    BrokerUnreachable,
    HetrainError,
    WireError,
    WorkerRefused,
)
from hetrain.public.protocol import keys
from hetrain.public.protocol.messages import Blob, Completion, EvaluateTask, parse
from hetrain.transport.requests.job_connection import JobConnection
from hetrain.transport.requests.recovery import RecoveryLoop
from hetrain.transport.requests.remote_errors import error_of
from hetrain.transport.requests.state import Request, Source
from hetrain.transport.scheduling.router import Router
from hetrain.transport.scheduling.throughput import work_of

_TICK_S = 1.0
_POP_COUNT = 64

logger = logging.getLogger(__name__)


class Collector:
    """Owns the requests of a job from `add` to `remove`. Thread-safe.

    Args:
        connection: the job's link to its broker.
        router: finds the way for requests.
        health_check: says what became of processes that this client depends on, None while they are well.
    """

    def __init__(
        self, connection: JobConnection, router: Router, health_check: Callable[[], HetrainError | None]
    ) -> None:
        self._connection = connection
        self._router = router
        self._health_check = health_check
        self._recovery = RecoveryLoop(connection, router, self._hear)
        self._requests: dict[str, Request] = {}
        self._end: HetrainError | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="hetrain-collector", daemon=True)

    def start(self) -> None:
        """Declares the job alive and starts the thread. Raises `BrokerError`."""
        self._recovery.start()
        self._thread.start()

    def keep(self, plan: Source) -> None:
        """Keeps the job's plan in the broker from now on."""
        self._recovery.keep(plan)

    def add(self, requests: Iterable[Request]) -> None:
        """Looks after `requests` from now on. Raises what ended the collector, if something has."""
        with self._lock:
            self._check()
            self._requests.update((request.id, request) for request in requests)

    def remove(self, requests: Iterable[Request]) -> None:
        """Forgets `requests`; what still comes for them is thrown away."""
        with self._lock:
            for request in requests:
                self._requests.pop(request.id, None)

    def assign(self, request: Request) -> None:
        """Chooses the queue of a request that is about to be sent."""
        with self._lock:
            self._router.assign(request, self._requests.values())

    def remaining(self) -> list[Request]:
        """The requests that it looks after now."""
        with self._lock:
            return list(self._requests.values())

    def count_products(self) -> int:
        """How many products wait for workers."""
        tasks = [request.task for request in self._waiting()]
        return len({task.input.token for task in tasks if isinstance(task, EvaluateTask)})

    def check(self) -> None:
        """Raises what ended the collector, if something has."""
        with self._lock:
            self._check()

    def wait(self, request: Request) -> Completion:
        """Waits for a request's end. Raises its failure, or what ended the collector."""
        while (completion := request.outcome(_TICK_S)) is None:
            if not self._thread.is_alive():
                self.stop(BrokerError("the thread that hears from the workers has ended"))
        return completion

    def wait_any(self, requests: Sequence[Request]) -> Request:
        """Waits until one of `requests`, which share an event, has an outcome."""
        done_event = requests[0].done_event
        while True:
            done_event.clear()
            for request in requests:
                if request.is_settled:
                    return request
            if not done_event.wait(_TICK_S) and not self._thread.is_alive():
                self.stop(BrokerError("the thread that hears from the workers has ended"))

    def ask_again(self, request: Request) -> None:
        """Has a request run again whose result was lost. Raises `BrokerError`."""
        with self._connection.errors():
            self._connection.client.delete(keys.finished(self._connection.job, request.id))
        with self._lock:
            self._check()
            request.resends += 1
            request.reopen()

    def stop(self, reason: HetrainError) -> None:
        """Settles all requests with `reason` and ends the thread. Only the first reason counts."""
        with self._lock:
            self._end = self._end or reason
            for request in self._requests.values():
                request.settle(self._end)

    def join(self, timeout_s: float) -> None:
        """Waits for the thread's end."""
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _check(self) -> None:
        if self._end is not None:
            raise self._end

    def _run(self) -> None:
        """What the thread does. However it ends, nobody is left waiting."""
        try:
            self._serve()
        except HetrainError as error:
            self.stop(error)
        except BaseException as error:
            logger.exception("the collector failed")
            failure = BrokerError(
                f"the thread that hears from the workers failed ({type(error).__name__}: {error})"
            )
            failure.__cause__ = error
            self.stop(failure)

    def _serve(self) -> None:
        heard_at, next_round = monotonic(), 0.0
        while self._end is None:
            if error := self._health_check():
                raise error
            try:
                self._pop()
                if monotonic() >= next_round:
                    next_round = monotonic() + _TICK_S
                    self._recovery.tick(self._waiting())
                heard_at = monotonic()
            except BrokerUnreachable:
                if monotonic() - heard_at > self._connection.timeouts.outage_s:
                    raise
                self._recovery.note_progress()  # an outage is not the workers' fault
                sleep(_TICK_S / 2)

    def _waiting(self) -> list[Request]:
        with self._lock:
            return [request for request in self._requests.values() if not request.is_settled]

    def _pop(self) -> None:
        client, name = self._connection.client, keys.done_list(self._connection.job)
        with self._connection.errors():
            popped = client.blpop([name], timeout=_TICK_S)
        messages = [popped[1]] if popped else []
        while messages and self._end is None:
            for message in messages:
                self._hear(message)
            with self._connection.errors():
                messages = client.lpop(name, _POP_COUNT) or []

    def _hear(self, message: bytes) -> None:
        try:
            completion = parse(Completion, message, where="done-list")
        except WireError as error:
            logger.warning("ignored a message: %s", error)
            return
        with self._lock:
            request = self._requests.get(completion.request)
        if request is None:
            self._throw_away(completion)
            return
        self._recovery.note_progress()
        if completion.state == "started":
            self._recovery.note_start(request, completion.worker)
        elif completion.state == "done":
            self._finish(request, completion)
        elif completion.failure is None:
            request.settle(
                WireError("a worker reported a failure without saying which", where=request.summary())
            )
        else:
            self._fail(request, error_of(completion.failure), completion.worker)

    def _finish(self, request: Request, completion: Completion) -> None:
        outcome, task = self._checked(request, completion), request.task
        if outcome is completion and isinstance(task, EvaluateTask) and not request.is_settled:
            self._router.throughput.note(completion.worker, work_of(task), completion.seconds)
        request.settle(outcome)

    def _fail(self, request: Request, error: HetrainError, worker: str) -> None:
        if request.is_settled:
            return
        if isinstance(error, BlobMissing):
            self._recovery.mark_lost(request, error)  # its blobs can be uploaded again
        elif isinstance(error, WorkerRefused) and self._router.serves_elsewhere(request, worker):
            self._recovery.mark_refused(request, error)
        else:
            request.settle(error)

    def _checked(self, request: Request, completion: Completion) -> Completion | WireError:
        """`completion` if it brings this request's own result, or none where there is none to bring."""
        output = completion.output
        wants_output = isinstance(request.task, EvaluateTask)
        if wants_output == (output is not None) and (output is None or self._is_result(output, request.id)):
            return completion
        return WireError("a worker reported a result that is not this request's", where=request.summary())

    def _is_result(self, blob: Blob, request: str) -> bool:
        return (blob.job, blob.kind, blob.token) == (self._connection.job, "out", keys.output_token(request))

    def _throw_away(self, completion: Completion) -> None:
        """Removes the result of a request that nobody waits for any more."""
        if completion.output is not None and self._is_result(completion.output, completion.request):
            self._connection.store.delete([completion.output])
