"""The round that is made once a second: looks at broker, workers and leases, and sends again what is due.

The rules are in `hetrain.transport.requests.decision`; here is their I/O. What was lost is sent again under
its old id, which is safe since tasks are pure functions of their blobs.
"""

from __future__ import annotations

import logging
from time import monotonic

from hetrain.public.broker.connection import while_full
from hetrain.public.errors import BlobMissing, BrokerFull, WireError
from hetrain.public.protocol import keys
from hetrain.public.protocol.messages import Completion, parse
from hetrain.transport.requests.cleanup import JobKeys
from hetrain.transport.requests.decision import Progress, Resend
from hetrain.transport.requests.job_connection import JobConnection
from hetrain.transport.requests.request import Source
from hetrain.transport.requests.state import (
    COUNTED,
    CompletionDamaged,
    Event,
    Observation,
    Reason,
    RequestState,
    Sent,
    event_of,
)
from hetrain.transport.requests.table import RequestTable
from hetrain.transport.scheduling.router import Router

_PLAN_REFRESH_S = 60.0

logger = logging.getLogger(__name__)


class RecoveryLoop:
    """Keeps a job and its requests going. Used by the thread that owns the table, except for `keep`.

    Args:
        connection: where lost blobs and tasks are sent again.
        router: chooses their queues.
        table: the requests.
        job_keys: the job's keys in the broker.
    """

    def __init__(
        self, connection: JobConnection, router: Router, table: RequestTable, job_keys: JobKeys
    ) -> None:
        self._connection = connection
        self._router = router
        self._table = table
        self._job_keys = job_keys
        self._plan: Source | None = None
        self._plan_refreshed_at = 0.0
        self._refused_at: float | None = None

    def start(self) -> None:
        """Declares the job alive, and reads which workers there are. Raises `BrokerError`."""
        while_full(self._declare_alive, limit_s=self._connection.timeouts.full_s)
        self._router.registry.refresh()

    def keep(self, plan: Source) -> None:
        """Keeps the job's plan in the broker from now on."""
        self._plan, self._plan_refreshed_at = plan, monotonic()

    def restart_waits(self) -> None:
        """Starts the waits for a sign of a worker, and for a full broker's memory, anew."""
        self._excuse_workers()
        self._refused_at = None

    def tick(self) -> None:
        """One round over all requests without an outcome.

        Raises:
            BrokerFull: for `Timeouts.full_s` seconds it has refused to store something, and no worker has
                given a sign.
            BrokerError: the broker fails.
        """
        self._look_at_broker()
        self._look_at_workers()
        self._look_at_leases()
        self._job_keys.forget(self._table.take_removed())
        try:
            self._try_memory()
            self._keep_plan()
            for state in self._table.pending():
                decision = self._table.settle(state.request.id)
                if isinstance(decision, Resend):
                    self.send_again(state.request.id, decision.reason)
        except BrokerFull as refusal:
            if self._table.pending():  # else no thread waits for the memory
                self._wait_for_memory(refusal)
                return
        self._refused_at = None

    def send_again(self, request: str, reason: Reason) -> None:
        """Sends a request again, with its blobs where they are missing. Raises `BrokerError`."""
        state = self._table.get(request)
        assert state is not None
        why = f"{reason.value}: {state.error}" if state.error is not None else reason.value
        logger.log(
            logging.WARNING if reason in COUNTED else logging.INFO,
            "sending again: %s (%s)",
            state.request,
            why,
        )
        for source in (self._plan, state.request.source):
            if source is not None:
                self._restore(source)
        self._remove_stale(request, reason)
        queue = self._router.choose(state.request, state.queue, state.refused_on)
        self._connection.sender.send(state.request, queue, full_s=0)
        self._table.observe(request, Sent(queue))

    def _remove_stale(self, request: str, reason: Reason) -> None:
        """Removes what would keep workers from running the request once more."""
        finished, tries = (kind(self._connection.job, request) for kind in (keys.finished, keys.tries))
        # Workers count how often a request was begun, to give up one that kills them: a worker that refuses
        # it, or whose answers do not count, was not killed by it.
        stale = {
            Reason.RESULT_LOST: (finished,),
            Reason.RESULT_REJECTED: (finished,),
            Reason.WORKER_EXCLUDED: (finished, tries),
            Reason.FAILED: (finished,),  # by a result that is not the request's
            Reason.REFUSED: (tries,),
        }
        if reason in stale:
            with self._connection.errors():
                self._connection.client.unlink(*stale[reason])

    def _excuse_workers(self) -> None:
        """Starts the waits for a sign of a worker anew: the broker is what is late."""
        self._table.progress = Progress(monotonic(), self._table.progress.handed_out)

    def _notify(self, states: list[RequestState], event: Event) -> None:
        for state in states:
            self._table.observe(state.request.id, event)

    def _look_at_broker(self) -> None:
        with self._connection.errors():
            # EXPIRE works also while the broker is out of memory.
            is_alive = self._connection.client.expire(keys.alive(self._connection.job), keys.ALIVE_TTL_S)
        if not is_alive:
            logger.warning("the broker has forgotten the job: sending everything again")
            self._excuse_workers()
            self._plan_refreshed_at = 0.0
            self._notify(self._table.pending(), Observation.BROKER_RESTARTED)

    def _look_at_workers(self) -> None:
        left = {self._router.queue_of(each) for each in self._router.registry.refresh()}
        pending = self._table.pending()
        self._notify([state for state in pending if state.queue in left], Observation.QUEUE_LOST_WORKER)
        for state in pending:
            is_served = self._router.serves_group(state.request)
            event = Observation.GROUP_SERVED if is_served else Observation.GROUP_UNSERVED
            self._table.observe(state.request.id, event)

    def _look_at_leases(self) -> None:
        """Looks after requests that a worker has, or may have, begun.

        Of one that was sent again, an earlier copy may be running: then workers skip the later ones.
        """
        begun = [
            state.request.id
            for state in self._table.pending()
            if state.started_at is not None or state.sends > 1
        ]
        if not begun:
            return
        job = self._connection.job
        with self._connection.errors():
            pipe = self._connection.client.pipeline(transaction=False)
            for request in begun:
                pipe.exists(keys.lease(job, request))
                pipe.get(keys.finished(job, request))
            answers = pipe.execute()
        for request, leased, finished in zip(begun, answers[::2], answers[1::2], strict=True):
            self._table.observe(request, self._seen(request, leased, finished))

    def _seen(self, request: str, leased: int, finished: bytes | None) -> Event:
        if leased:
            return Observation.LEASE_SEEN
        state = self._table.get(request)
        if finished and state is not None:
            try:
                return event_of(parse(Completion, finished, where="finished request"), state.request)
            except WireError as error:
                what = f"the completion that the broker keeps is damaged: {error.what}"
                return CompletionDamaged(BlobMissing(what, where=str(state.request)))
        return Observation.LEASE_MISSING

    def _declare_alive(self) -> None:
        with self._connection.errors():
            self._connection.client.set(
                keys.alive(self._connection.job), keys.ALIVE_VALUE, ex=keys.ALIVE_TTL_S
            )

    def _try_memory(self) -> None:
        """Writes as much as a task or a report takes. Raises `BrokerFull` when there is no room for it."""
        try:
            self._declare_alive()
        except BrokerFull:
            self._notify(self._table.pending(), Observation.BROKER_FULL)
            raise

    def _wait_for_memory(self, refusal: BrokerFull) -> None:
        """Waits for memory. Raises `refusal` once that has taken too long."""
        self._excuse_workers()
        now = monotonic()
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
