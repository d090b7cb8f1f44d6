"""The channel over Celery and Redis: tasks go through the queue, ciphertexts lie beside it as blobs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, wait
from contextlib import suppress
from functools import partial
from itertools import count
from time import monotonic, sleep
from typing import TypeVar

from hetrain.public.broker.blobs import BlobStore
from hetrain.public.broker.server_info import ask_broker
from hetrain.public.errors import (
    BlobMissing,
    BrokerError,
    BrokerUnreachable,
    HetrainError,
    Interrupted,
    ResultRejected,
    UsageError,
    WireError,
)
from hetrain.public.protocol.messages import (
    QUEUE,
    Blob,
    Completion,
    EvaluateTask,
    Header,
    PrepareTask,
    new_token,
)
from hetrain.public.protocol.plan import parse_plan
from hetrain.public.protocol.product import Operand, Part, Product
from hetrain.public.protocol.registration import WorkerRegistration
from hetrain.public.protocol.tenants import new_job
from hetrain.transport.channel import NO_HEADER, Accept, Reply, accept_any
from hetrain.transport.requests.cleanup import JobKeys
from hetrain.transport.requests.collector import TICK_S, Collector
from hetrain.transport.requests.job_connection import JobConnection
from hetrain.transport.requests.request import Request, Source, Timeouts, evaluate_task, prepare_task
from hetrain.transport.requests.sender import Sender
from hetrain.transport.requests.state import ResultLost, ResultRefused, sent
from hetrain.transport.requests.table import Outcome
from hetrain.transport.scheduling.flow_control import ByteBudget, share_of
from hetrain.transport.scheduling.partition import partition
from hetrain.transport.scheduling.registry import WorkerRegistry
from hetrain.transport.scheduling.router import Router

MAX_REPLY_BYTES = 1 << 30
# A connection can be cut in the middle of it.
_CLEANING_ATTEMPTS = 2
_RETRY_PAUSE_S = 0.5
_POLL_S = 0.1

T = TypeVar("T")


class CeleryChannel:
    """A job's way to the workers; see `Channel`.

    Args:
        url: the broker's address.
        job: the job's token; a fresh one by default.
        timeouts: how long to wait for what.
        health_check: reports what became of processes that this client depends on (see `Embedded.failure`).
        max_bytes_in_flight: the most that operands and results may take in the broker at once; None takes a
            share of its memory, and lets a request that is larger than that travel alone.

    Attributes:
        job: the job's token.
        budget: how many bytes of operands and results it has in flight.

    Raises:
        UsageError: the URL makes no sense.
        BrokerUnreachable: the broker does not answer.
        BrokerFull: the broker has no memory even for small messages, for as long as the channel waits.
    """

    def __init__(
        self,
        url: str,
        *,
        job: str | None = None,
        timeouts: Timeouts | None = None,
        health_check: Callable[[], HetrainError | None] = lambda: None,
        max_bytes_in_flight: int | None = None,
    ) -> None:
        capacity = ask_broker(url).maxmemory
        limit = max_bytes_in_flight or share_of(capacity)
        self.budget = ByteBudget(limit, strict=max_bytes_in_flight is not None, capacity=capacity)
        timeouts = timeouts or Timeouts()
        self.job = job or new_job()
        self._connection = JobConnection(
            url, self.job, BlobStore(url, full_s=timeouts.full_s), Sender(url), timeouts
        )
        self._job_keys = JobKeys(self._connection)
        self._router = Router(WorkerRegistry(self._connection), self.job, url)
        self._collector = Collector(self._connection, self._router, self._job_keys, health_check)
        self._prepared: PrepareTask | None = None
        self._closing = threading.Lock()
        try:
            self._collector.start()
        except BaseException:
            self._connection.close()
            raise

    @property
    def workers(self) -> tuple[WorkerRegistration, ...]:
        """The workers that are registered now."""
        return self._router.registry.workers.registrations

    def prepare(
        self, model: str, engine: str, plan: bytes, plan_digest: str, setup: Header = NO_HEADER
    ) -> Completion:
        """See `Channel.prepare`."""
        self._router.follow(parse_plan(plan, plan_digest))
        parts = [memoryview(plan)]
        blob = self._patiently(lambda: self._connection.store.put(self.job, "plan", plan_digest, parts))
        self._job_keys.note_plan(blob)
        self._collector.keep(Source(blob, parts))
        task = prepare_task(model, engine, blob, setup)
        completion = self._agree(task)
        self._prepared = task
        return completion

    def multiply(self, product: Product, operand: Operand, accept: Accept = accept_any) -> Reply:
        """See `Channel.multiply`. Waits while as much is on its way as may be."""
        self._collector.check()
        with self.budget.reserved(operand.nbytes + operand.result_bytes):
            return self._exchange(product, operand, accept)

    def _exchange(self, product: Product, operand: Operand, accept: Accept) -> Reply:
        """Uploads the operand, sends one request for each range of rows, and collects their results."""
        self._collector.check()
        if self._prepared is None:
            raise UsageError("the channel must be prepared before something is sent")
        work = product.n * operand.nbytes
        pieces = self._router.pieces(product.group.name, work, len(self.budget.held))
        put = partial(self._connection.store.put, self.job, "in", new_token(), operand.payload)
        source = Source(blob := self._patiently(put), operand.payload)
        requests = [
            Request(
                evaluate_task(self._prepared, new_token(), product, operand.header, rows, blob),
                source,
                self._connection.timeouts.run_s,
            )
            for rows in partition(product.n, pieces, operand.row_step)
        ]
        ids = [request.id for request in requests]
        try:
            outcomes = {self._submit(request, QUEUE): request for request in requests}
            parts = self._collect(outcomes, blob, accept, operand.result_bytes or MAX_REPLY_BYTES)
        except BaseException:
            self._collector.forget(ids)
            with suppress(BrokerError):  # they expire anyway
                self._job_keys.remove_blobs(ids, blob)
            raise
        self._collector.forget(ids)
        return Reply(tuple(sorted(parts, key=lambda part: part.rows)), blob.nbytes)

    def _collect(
        self, outcomes: dict[Outcome, Request], operand: Blob, accept: Accept, limit: int
    ) -> list[Part]:
        """The requests' results in the order in which they arrive, each accepted. Their blobs are deleted.

        None that is said to be larger than `limit` is downloaded.
        """
        accepted: dict[Request, Part] = {}
        while outcomes:
            done, _ = wait(outcomes, timeout=TICK_S, return_when=FIRST_COMPLETED)
            if not done:
                self._collector.check()
            for outcome in done:
                request, completion = outcomes.pop(outcome), outcome.result()
                try:
                    accepted[request] = self._download(
                        request, completion, [] if outcomes else [operand], limit
                    )
                    accept(accepted[request])
                except BlobMissing as error:
                    outcomes[self._collector.reopen(request.id, ResultLost(error))] = request
                except WireError as error:  # it is not of the size that was announced, or of no possible one
                    accepted.pop(request, None)
                    event = ResultRefused(completion.worker, error)
                    outcomes[self._collector.reopen(request.id, event)] = request
                except ResultRejected as error:
                    if not error.workers:
                        raise
                    for each in [each for each in accepted if accepted[each].worker in error.workers]:
                        event = ResultRefused(accepted.pop(each).worker, error)
                        outcomes[self._collector.reopen(each.id, event)] = each
        return list(accepted.values())

    def _download(
        self, request: Request, completion: Completion, finished: Sequence[Blob], limit: int
    ) -> Part:
        """Takes a result, and the blobs that are needed no more with it."""
        assert isinstance(request.task, EvaluateTask)
        assert completion.output is not None  # a completion without it is not this request's
        take = partial(self._connection.store.take, completion.output, finished, limit=limit)
        data = self._patiently(take)
        rows = request.task.start, request.task.stop
        return Part(rows, data, completion.worker, completion.device, completion.seconds)

    def close(self) -> None:
        """See `Channel.close`."""
        if not self._closing.acquire(blocking=False):
            return
        reason = Interrupted("the channel was closed")
        self.budget.close(reason)
        self._collector.stop(reason)
        # A collector in the middle of a round would take a missing `alive` key for a broker that restarted.
        states = self._collector.join(5.0)
        for _ in range(_CLEANING_ATTEMPTS):
            with suppress(BrokerError):  # what is left expires
                self._job_keys.declare_dead()
                self._job_keys.remove_all(states)
                break
        self._connection.close()

    def _agree(self, task: PrepareTask) -> Completion:
        """Waits until a worker of every queue that serves a part of the plan has agreed to it.

        Raises: what a worker refuses with; `NoWorker` when a part stays without any.
        """
        asked: dict[str, Outcome] = {}
        ids: list[str] = []
        missing: tuple[int, ...] = ()
        missing_at = 0.0
        timeouts = self._connection.timeouts
        try:
            while True:
                coverage = self._router.coverage()
                for queue in set(coverage.queues) - set(asked):
                    copy = task.model_copy(update={"request": new_token()})
                    ids.append(copy.request)
                    asked[queue] = self._submit(Request(copy, None, timeouts.prepare_s), queue)
                wanted = [asked[queue] for queue in coverage.queues]
                done, waiting = wait(wanted, timeout=_POLL_S, return_when=FIRST_EXCEPTION)
                answers = [outcome.result() for outcome in wanted if outcome in done]
                if answers and not waiting and not coverage.missing:
                    return answers[0]
                self._collector.check()
                if coverage.missing != missing:
                    missing, missing_at = coverage.missing, monotonic()
                if missing:  # workers may still be starting
                    if monotonic() - missing_at > timeouts.no_worker_s:
                        raise self._router.not_served(missing, timeouts.no_worker_s)
                    sleep(_POLL_S)
        finally:
            self._collector.forget(ids)

    def _submit(self, request: Request, queue: str) -> Outcome:
        """Sends a request: to `queue`, unless the registered workers tell better."""
        queue = self._router.assign(request, queue)
        # First: neither an answer nor a broker that restarts may be missed.
        outcome = self._collector.submit(sent(request, queue, monotonic()))
        full_s = self._connection.timeouts.full_s
        attempts = count()

        def send() -> None:
            if next(attempts):  # the one before may have reached the broker all the same
                self._collector.count_sending(request.id)
            self._connection.sender.send(request, queue, full_s=full_s)

        self._patiently(send)
        return outcome

    def _patiently(self, attempt: Callable[[], T]) -> T:
        """Calls `attempt` until the broker can be reached, for as long as the channel waits."""
        end = monotonic() + self._connection.timeouts.outage_s
        while True:
            self._collector.check()
            try:
                return attempt()
            except BrokerUnreachable:
                if monotonic() > end:
                    raise
                sleep(_RETRY_PAUSE_S)
