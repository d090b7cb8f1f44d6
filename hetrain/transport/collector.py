"""The collector: one thread that hears from all workers of a job and looks after what is on its way.

It pops `Completion` messages from the job's done-list and settles requests with them. Every second it looks
for what cannot report itself: workers that died (their lease has run out), tasks that nobody takes, a broker
that has restarted and forgotten everything (the job's ``alive`` key is gone). What was lost is sent again under
its old id, which is safe since tasks are pure functions of their blobs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from time import monotonic

from hetrain.public import keys
from hetrain.public.blobs import BlobStore
from hetrain.public.broker import broker_errors, redacted
from hetrain.public.errors import (
    BlobMissing,
    BrokerError,
    BrokerFull,
    BrokerUnreachable,
    HetrainError,
    NoWorker,
    TaskFailed,
    WireError,
)
from hetrain.public.wire import QUEUE, Completion, EvaluateTask, parse
from hetrain.transport.failures import error_of
from hetrain.transport.requests import Patience, Request, Source
from hetrain.transport.sender import Sender

_TICK_S = 1.0
_PLAN_REFRESH_S = 60.0
_POP_COUNT = 64
_REUPLOAD_FULL_S = 2.0
_LOOKS_UNTIL_DEAD = 2

logger = logging.getLogger(__name__)


class Collector:
    """Owns the requests of a job from `add` to `remove`.

    Args:
        url: the broker's address.
        job: the job's token.
        store: where blobs go that must be uploaded again.
        sender: sends tasks again.
        patience: how long to wait for what.
        watch: says what became of processes that this client depends on, None while they are well.
    """

    def __init__(
        self,
        url: str,
        job: str,
        store: BlobStore,
        sender: Sender,
        patience: Patience,
        watch: Callable[[], HetrainError | None],
    ) -> None:
        self._url = url
        self._job = job
        self._store = store
        self._sender = sender
        self._patience = patience
        self._watch = watch
        self._requests: dict[str, Request] = {}
        self._plan: Source | None = None
        self._plan_refreshed_at = 0.0
        self._progress_at = monotonic()
        self._tick_at = 0.0
        self._end: HetrainError | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="hetrain-collector", daemon=True)

    def start(self) -> None:
        """Declares the job alive and starts the thread. Raises `BrokerError`."""
        with broker_errors(self._url):
            self._declare_alive()
        self._thread.start()

    def keep(self, plan: Source) -> None:
        """Keeps the job's plan in the broker from now on."""
        self._plan, self._plan_refreshed_at = plan, monotonic()

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

    def check(self) -> None:
        """Raises what ended the collector, if something has."""
        with self._lock:
            self._check()

    def wait(self, request: Request) -> Completion:
        """Waits for a request's end. Raises its failure, or what ended the collector."""
        while (completion := request.outcome(_TICK_S * 5)) is None:
            if not self._thread.is_alive():
                self.stop(BrokerError("the thread that hears from the workers has ended"))
        return completion

    def ask_again(self, request: Request) -> None:
        """Has a request run again whose result was lost. Raises `BrokerError`."""
        with broker_errors(self._url):
            self._store.client.delete(keys.finished(self._job, request.id))
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
        """Waits for the thread."""
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _check(self) -> None:
        if self._end is not None:
            raise self._end

    # All that follows runs in the collector's thread.

    def _run(self) -> None:
        heard_at = monotonic()
        try:
            while self._end is None:
                try:
                    self._pop()
                    self._tick()
                    heard_at = monotonic()
                except BrokerUnreachable:
                    self._raise_what_died()
                    if monotonic() - heard_at > self._patience.outage_s:
                        raise
                    self._progress_at = monotonic()
                    threading.Event().wait(_TICK_S / 2)
        except HetrainError as error:
            self.stop(error)
        except BaseException as error:
            logger.exception("the collector failed")
            failure = BrokerError(
                f"the thread that hears from the workers failed ({type(error).__name__}: {error})"
            )
            failure.__cause__ = error
            self.stop(failure)

    def _pop(self) -> None:
        with broker_errors(self._url):
            client, name = self._store.client, keys.done_list(self._job)
            popped = client.blpop([name], timeout=_TICK_S)
            messages = [popped[1]] if popped else []
            while messages and self._end is None:
                for message in messages:
                    self._hear(message)
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
        self._progress_at = monotonic()
        if request.is_settled:
            return
        if completion.state == "started":
            request.mark_started(completion.worker)
        elif completion.state == "done":
            request.settle(self._checked(request, completion))
        else:
            self._hear_failure(request, completion)

    def _hear_failure(self, request: Request, completion: Completion) -> None:
        if completion.failure is None:
            request.settle(
                WireError("a worker reported a failure without saying which", where=request.summary())
            )
            return
        error = error_of(completion.failure)
        if isinstance(error, BlobMissing):
            self._mark_lost(request, error)
        else:
            request.settle(error)

    def _checked(self, request: Request, completion: Completion) -> Completion | WireError:
        """`completion` if its output is this request's own."""
        output, has_output = completion.output, isinstance(request.task, EvaluateTask)
        if (output is not None) == has_output and (
            output is None
            or (output.job, output.kind, output.token) == (self._job, "out", keys.output_token(request.id))
        ):
            return completion
        return WireError("a worker reported a result that is not this request's", where=request.summary())

    def _throw_away(self, completion: Completion) -> None:
        """Removes the result of a request that nobody waits for any more."""
        output = completion.output
        if output is not None and (output.job, output.kind, output.token) == (
            self._job,
            "out",
            keys.output_token(completion.request),
        ):
            self._store.delete([output])

    def _tick(self) -> None:
        if monotonic() < self._tick_at:
            return
        self._tick_at = monotonic() + _TICK_S
        self._raise_what_died()
        with self._lock:
            waiting = [request for request in self._requests.values() if not request.is_settled]
        sent = [request for request in waiting if request.sent_at is not None]
        if not self._still_alive():
            logger.warning("the broker has forgotten the job: sending everything again")
            with broker_errors(self._url):
                self._declare_alive()
            self._plan_refreshed_at = 0.0
            for request in sent:
                request.is_lost = True
        self._keep_plan()
        self._look_for_dead_workers([request for request in sent if request.started_at is not None])
        for request in sent:
            if request.is_lost and not request.is_settled:
                self._send_again(request)
            elif request.started_at is None:
                self._look_for_workers(request)

    def _raise_what_died(self) -> None:
        if error := self._watch():
            raise error

    def _declare_alive(self) -> None:
        self._store.client.set(keys.alive(self._job), "1", ex=keys.ALIVE_TTL_S)

    def _still_alive(self) -> bool:
        with broker_errors(self._url):
            return bool(self._store.client.expire(keys.alive(self._job), keys.ALIVE_TTL_S))

    def _keep_plan(self) -> None:
        if self._plan is not None and monotonic() > self._plan_refreshed_at + _PLAN_REFRESH_S:
            self._restore(self._plan)
            self._plan_refreshed_at = monotonic()

    def _restore(self, source: Source) -> None:
        """Starts a blob's lifetime anew, and uploads it if it is gone."""
        blob = source.blob
        if not self._store.refresh(blob):
            self._store.put(blob.job, blob.kind, blob.token, source.parts, full_s=_REUPLOAD_FULL_S)

    def _look_for_dead_workers(self, started: list[Request]) -> None:
        if not started:
            return
        with broker_errors(self._url):
            pipe = self._store.client.pipeline(transaction=False)
            for request in started:
                pipe.exists(keys.lease(self._job, request.id))
                pipe.get(keys.finished(self._job, request.id))
            answers = pipe.execute()
        for request, leased, finished in zip(started, answers[::2], answers[1::2], strict=True):
            if leased:
                request.unleased = 0
                self._progress_at = monotonic()
                self._look_for_hung_worker(request)
            elif finished:
                self._hear(finished)
            else:
                # A failure reported since the last pop looks the same, until the next pop.
                request.unleased += 1
                if request.unleased >= _LOOKS_UNTIL_DEAD:
                    self._mark_lost(request, self._died(request))

    def _died(self, request: Request) -> TaskFailed:
        return TaskFailed(
            f"the worker {request.worker} died while it ran this task, after {request.resends} other attempts",
            where=request.summary(),
            hint="see the workers' logs; if they ran out of memory, use smaller micro-batches",
        )

    def _mark_lost(self, request: Request, error: HetrainError) -> None:
        if request.resends >= self._patience.attempts:
            request.settle(error)
            return
        logger.warning("sending again: %s (%s)", request.summary(), error.what)
        request.resends += 1
        request.is_lost = True

    def _look_for_hung_worker(self, request: Request) -> None:
        if request.started_at is not None and monotonic() - request.started_at > request.run_limit_s:
            request.settle(
                TaskFailed(
                    f"the worker {request.worker} has not finished after {request.run_limit_s:.0f} s",
                    where=request.summary(),
                    hint="see its log; a larger job needs smaller micro-batches or more workers",
                )
            )

    def _look_for_workers(self, request: Request) -> None:
        """Fails or repeats a request that nobody has begun."""
        now = monotonic()
        if request.sent_at is None:
            return
        if now - max(request.sent_at, self._progress_at) > self._patience.no_worker_s:
            request.settle(
                NoWorker(
                    f"no worker answered on queue {QUEUE!r} within {self._patience.no_worker_s:.0f} s",
                    where=redacted(self._url),
                    hint=f"start one with HETRAIN_BROKER_URL=... celery -A tasks worker -Q {QUEUE}",
                )
            )
        elif now - request.sent_at > self._patience.deadline_s:
            self._send_again(request)

    def _send_again(self, request: Request) -> None:
        try:
            if self._plan is not None:
                self._restore(self._plan)
            if request.source is not None:
                self._restore(request.source)
            request.mark_sent()
            self._sender.send(request)
        except BrokerFull:
            request.is_lost = True  # the next tick tries again
        except BrokerUnreachable:
            request.is_lost = True
            raise
