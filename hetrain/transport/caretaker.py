"""Looks after what cannot report itself: dead workers, tasks that nobody takes, a broker that forgot them.

What was lost is sent again under its old id, which is safe since tasks are pure functions of their blobs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic

from hetrain.public import keys
from hetrain.public.blobs import BlobStore
from hetrain.public.broker import broker_errors, redacted
from hetrain.public.errors import BrokerError, BrokerFull, HetrainError, NoWorker, TaskFailed
from hetrain.public.wire import QUEUE
from hetrain.transport.requests import Patience, Request, Source
from hetrain.transport.sender import Sender

_PLAN_REFRESH_S = 60.0
_REUPLOAD_FULL_S = 2.0
_LOOKS_UNTIL_DEAD = 2
_SHARE_UNTIL_RESENT = 1 / 3

logger = logging.getLogger(__name__)


class Caretaker:
    """Keeps a job and its requests going. Used by one thread, except for `keep`.

    Args:
        url: the broker's address.
        job: the job's token.
        store: where lost blobs are uploaded again.
        sender: sends lost tasks again.
        patience: how long to wait for what.
        hear: takes a `Completion` message that was found without the done-list.
    """

    def __init__(
        self,
        url: str,
        job: str,
        store: BlobStore,
        sender: Sender,
        patience: Patience,
        hear: Callable[[bytes], None],
    ) -> None:
        self._url = url
        self._job = job
        self._store = store
        self._sender = sender
        self._patience = patience
        self._hear = hear
        self._plan: Source | None = None
        self._plan_refreshed_at = 0.0
        self._progress_at = monotonic()

    def declare_alive(self) -> None:
        """Tells workers that this job's tasks are wanted. Raises `BrokerError`."""
        with broker_errors(self._url):
            self._store.client.set(keys.alive(self._job), "1", ex=keys.ALIVE_TTL_S)

    def keep(self, plan: Source) -> None:
        """Keeps the job's plan in the broker from now on."""
        self._plan, self._plan_refreshed_at = plan, monotonic()

    def note_progress(self) -> None:
        """Starts the wait for a first sign of any worker anew."""
        self._progress_at = monotonic()

    def look_after(self, requests: list[Request]) -> None:
        """One round over all requests without outcome. Raises `BrokerError` when the broker fails."""
        sent = [request for request in requests if request.sent_at is not None]
        if not self._is_alive():
            logger.warning("the broker has forgotten the job: sending everything again")
            self.declare_alive()
            self.note_progress()
            self._plan_refreshed_at = 0.0
            for request in sent:
                request.is_lost = True
        self._keep_plan()
        self._look_at_workers([request for request in sent if request.started_at is not None])
        for request in sent:
            if request.is_settled:
                continue
            if request.is_lost:
                self._send_again(request)
            elif request.started_at is None:
                self._look_at_waiting(request)

    def mark_lost(self, request: Request, error: HetrainError) -> None:
        """Has `request` sent again in the next round, or fails it with `error` after too many attempts."""
        if request.resends >= self._patience.attempts:
            request.settle(error)
            return
        logger.warning("sending again: %s (%s)", request.summary(), error.what)
        request.resends += 1
        request.is_lost = True

    def _is_alive(self) -> bool:
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

    def _look_at_workers(self, started: list[Request]) -> None:
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
                self.note_progress()
                self._look_at_running(request)
            elif finished:
                self._hear(finished)
            else:
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

    def _look_at_waiting(self, request: Request) -> None:
        """Fails or repeats a request that nobody has begun."""
        now, sent_at = monotonic(), request.sent_at or 0.0
        if now - max(request.asked_at or 0.0, self._progress_at) > self._patience.no_worker_s:
            request.settle(
                NoWorker(
                    f"no worker answered on queue {QUEUE!r} within {self._patience.no_worker_s:.0f} s",
                    where=redacted(self._url),
                    hint=f"start one with HETRAIN_BROKER_URL=... celery -A tasks worker -Q {QUEUE}",
                )
            )
        elif (
            now - sent_at > self._patience.deadline_s
            or now - max(sent_at, self._progress_at) > self._patience.no_worker_s * _SHARE_UNTIL_RESENT
        ):
            # A worker may have died before it could say that it had begun. A second copy does no harm.
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
            request.is_lost = True  # the next round tries again
        except BrokerError:
            request.is_lost = True
            raise


def _died(request: Request) -> TaskFailed:
    return TaskFailed(
        f"the worker {request.worker} died while it ran this task, as {request.resends} others had",
        where=request.summary(),
        hint="see the workers' logs; if they ran out of memory, use smaller micro-batches",
    )
