"""Looks after what cannot report itself: dead workers, tasks that nobody takes, a forgetful or full broker.

What was lost is sent again under its old id, which is safe since tasks are pure functions of their blobs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic

from hetrain.public.broker.connection import while_full
from hetrain.public.errors import BrokerError, BrokerFull, HetrainError, TaskFailed, WorkerRefused
from hetrain.public.protocol import keys
from hetrain.transport.requests.job_connection import JobConnection
from hetrain.transport.requests.state import Request, Source, Timeouts
from hetrain.transport.scheduling.router import Router

_PLAN_REFRESH_S = 60.0
_LOOKS_UNTIL_DEAD = 2
_SILENCE_S = 3.0
_SHARE_UNTIL_RESENT = 1 / 3
_OVERTAKEN_S = 1.0

logger = logging.getLogger(__name__)


class RecoveryLoop:
    """Keeps a job and its requests going. Used by one thread, except for `keep`.

    Args:
        connection: where lost blobs and tasks are sent again.
        router: finds the way for them.
        hear: takes a `Completion` message that was found without the done-list.
    """

    def __init__(self, connection: JobConnection, router: Router, hear: Callable[[bytes], None]) -> None:
        self._connection = connection
        self._router = router
        self._hear = hear
        self._plan: Source | None = None
        self._plan_refreshed_at = 0.0
        self._progress_at = monotonic()
        self._refused_at: float | None = None
        self._last_started_sent_at: dict[str, float] = {}

    def start(self) -> None:
        """Tells workers that this job's tasks are wanted, and looks who is there. Raises `BrokerError`."""
        while_full(self._declare_alive, limit_s=self._connection.timeouts.full_s)
        self._router.registry.refresh()

    def keep(self, plan: Source) -> None:
        """Keeps the job's plan in the broker from now on."""
        self._plan, self._plan_refreshed_at = plan, monotonic()

    def note_progress(self) -> None:
        """Starts the waits for a sign of any worker, and for a full broker's memory, anew."""
        self._progress_at, self._refused_at = monotonic(), None

    def note_start(self, request: Request, worker: str) -> None:
        """Notes that `worker` has begun `request`: what its queue got before it has been taken as well."""
        if request.sends == 1:  # else it may be the first copy, from far before `sent_at` or another queue
            self._last_started_sent_at[request.queue] = max(
                self._last_started_sent_at.get(request.queue, 0.0), request.sent_at or 0.0
            )
        request.mark_started(worker)

    def tick(self, requests: list[Request]) -> None:
        """One round over all requests without outcome.

        Raises:
            BrokerFull: for `Timeouts.full_s` seconds it has refused to store something, and no worker was
                heard.
            BrokerError: the broker fails.
        """
        sent = [request for request in requests if request.sent_at is not None]
        if not self._is_alive():
            logger.warning("the broker has forgotten the job: sending everything again")
            self._progress_at = monotonic()
            self._plan_refreshed_at = 0.0
            for request in sent:
                request.is_lost = True
        self._look_at_fleet([request for request in sent if request.started_at is None])
        # Of one that was sent again, an earlier copy may be running: then workers skip the later ones.
        self._look_at_workers(
            [request for request in sent if request.started_at is not None or request.sends > 1]
        )
        try:
            self._try_memory(sent)
            self._keep_plan()
            self._send_missing(sent)
        except BrokerFull as refusal:
            if requests:  # else nobody waits for the memory
                self._wait_for_memory(refusal)
                return
        self._refused_at = None

    def mark_lost(self, request: Request, error: HetrainError) -> None:
        """Has `request` sent again in the next round, or fails it with `error` after too many attempts."""
        if request.resends >= self._connection.timeouts.attempts:
            request.settle(error)
            return
        logger.warning("sending again: %s (%s)", request.summary(), error.what)
        request.resends += 1
        request.is_lost = True

    def mark_refused(self, request: Request, error: WorkerRefused) -> None:
        """Has `request` sent again after a worker that does not serve it took it from those that do.

        Fails it with `error` when none of those has had it for as long as one may run it. Raises
        `BrokerError`.
        """
        request.refused_on.append(request.queue)
        if monotonic() - (request.asked_at or monotonic()) > request.run_limit_s:
            request.settle(error)
            return
        request.is_lost = True
        with self._connection.errors():
            # Workers count how often a request was begun, to give up one that kills them.
            self._connection.client.unlink(keys.tries(self._connection.job, request.id))

    def _look_at_fleet(self, unstarted: list[Request]) -> None:
        """Has requests sent again that a worker may have had when it left, or that only others would take."""
        queues_that_lost_a_worker = self._router.registry.refresh()
        for request in unstarted:
            if request.queue in queues_that_lost_a_worker or self._router.is_misrouted(request):
                request.is_lost = True

    def _is_alive(self) -> bool:
        with self._connection.errors():
            # EXPIRE works also while the broker is out of memory.
            return bool(self._connection.client.expire(keys.alive(self._connection.job), keys.ALIVE_TTL_S))

    def _declare_alive(self) -> None:
        with self._connection.errors():
            self._connection.client.set(
                keys.alive(self._connection.job), keys.ALIVE_VALUE, ex=keys.ALIVE_TTL_S
            )

    def _try_memory(self, sent: list[Request]) -> None:
        """Writes as much as a task or a report takes. Raises `BrokerFull` when there is no room for it."""
        try:
            self._declare_alive()
        except BrokerFull:
            for request in sent:
                if request.started_at is None:
                    # Kombu pops a message before it notes whose it is: without room for the note it is lost.
                    request.is_lost = True
            raise

    def _wait_for_memory(self, refusal: BrokerFull) -> None:
        """Waits for memory. Raises `refusal` once that has taken too long."""
        now = monotonic()
        self._progress_at = now  # it is not the workers' fault
        if self._refused_at is None:
            self._refused_at = now
        elif now - self._refused_at > self._connection.timeouts.full_s:
            raise refusal

    def _keep_plan(self) -> None:
        if self._plan is not None and monotonic() > self._plan_refreshed_at + _PLAN_REFRESH_S:
            self._restore(self._plan)
            self._plan_refreshed_at = monotonic()

    def _restore(self, source: Source) -> None:
        """Starts a blob's lifetime anew, and uploads it if it is gone."""
        blob, store = source.blob, self._connection.store
        if not store.refresh(blob):
            store.put(blob.job, blob.kind, blob.token, source.parts, full_s=0)

    def _look_at_workers(self, begun: list[Request]) -> None:
        """Looks after requests that a worker has, or may have, begun."""
        if not begun:
            return
        job = self._connection.job
        with self._connection.errors():
            pipe = self._connection.client.pipeline(transaction=False)
            for request in begun:
                pipe.exists(keys.lease(job, request.id))
                pipe.get(keys.finished(job, request.id))
            answers = pipe.execute()
        for request, leased, finished in zip(begun, answers[::2], answers[1::2], strict=True):
            if leased:
                if request.started_at is None:  # whoever was taken for dead is not
                    request.mark_started(request.worker or "unknown")
                    request.resends = max(request.resends - 1, 0)
                request.unleased = 0
                self._progress_at = monotonic()
                self._look_at_running(request)
            elif finished:
                self._hear(finished)
            elif request.started_at is not None:
                # A failure that was reported since the last look at the done-list looks the same, once.
                request.unleased += 1
                if request.unleased >= _LOOKS_UNTIL_DEAD and not request.is_lost:
                    self.mark_lost(request, _died(request))

    def _look_at_running(self, request: Request) -> None:
        if request.started_at is not None and monotonic() - request.started_at > request.run_limit_s:
            request.settle(
                TaskFailed(
                    f"the worker {request.worker} has not finished after {request.run_limit_s:.0f} s",
                    where=request.summary(),
                    hint="see its log; use smaller micro-batches or more workers",
                )
            )

    def _send_missing(self, sent: list[Request]) -> None:
        """Sends again what is lost or waits too long. Raises `BrokerFull`: the next round goes on."""
        for request in sent:
            if request.is_settled:
                continue
            if request.is_lost:
                self._send_again(request, sent)
            elif request.started_at is None:
                self._look_at_waiting(request, sent)

    def _look_at_waiting(self, request: Request, sent: list[Request]) -> None:
        """Fails or repeats a request that nobody has begun."""
        now, sent_at, timeouts = monotonic(), request.sent_at or 0.0, self._connection.timeouts
        if self._is_given_up(request):
            request.settle(self._router.not_served(self._router.coverage().missing, timeouts.no_worker_s))
        elif now - max(request.asked_at or 0.0, self._progress_at) > self._longest_wait(request):
            request.settle(self._router.no_worker(request.queue, timeouts.no_worker_s))
        elif (
            now - sent_at > timeouts.deadline_s
            or now - max(sent_at, self._progress_at) > _longest_silence(request, timeouts)
            or self._is_overtaken(request)
        ):
            # A worker may have died before it could say that it had begun. A second copy does no harm.
            self._send_again(request, sent)

    def _longest_wait(self, request: Request) -> float:
        """Seconds without a sign of any worker until a request fails: more where one announces to serve it.

        Such a worker is busy with other jobs.
        """
        timeouts = self._connection.timeouts
        return request.run_limit_s if self._router.is_served(request) else timeouts.no_worker_s

    def _is_overtaken(self, request: Request) -> bool:
        """Whether its queue, first in, first out, has handed out what came well after it."""
        taken = self._last_started_sent_at.get(request.queue, 0.0)
        return taken > (request.sent_at or 0.0) + _OVERTAKEN_S * request.sends

    def _is_given_up(self, request: Request) -> bool:
        """Whether the group of `request` has been without a worker for too long, while others have some."""
        if not self._router.is_unserved(request):
            request.unserved_at = None
            return False
        request.unserved_at = request.unserved_at or monotonic()
        return monotonic() - request.unserved_at > self._connection.timeouts.no_worker_s

    def _send_again(self, request: Request, sent: list[Request]) -> None:
        try:
            if self._plan is not None:
                self._restore(self._plan)
            if request.source is not None:
                self._restore(request.source)
            self._router.assign(request, sent)
            request.mark_sent()
            self._connection.sender.send(request, full_s=0)
        except BrokerError:
            request.is_lost = True
            raise


def _longest_silence(request: Request, timeouts: Timeouts) -> float:
    """Seconds without a sign of any worker until a request is sent again: twice as many after each time."""
    return min(_SILENCE_S * 2.0 ** min(request.sends - 1, 10), timeouts.no_worker_s * _SHARE_UNTIL_RESENT)


def _died(request: Request) -> TaskFailed:
    return TaskFailed(
        f"the worker {request.worker} died while it ran this task, as {request.resends} others had",
        where=request.summary(),
        hint="see the workers' logs; if they ran out of memory, use smaller micro-batches",
    )
