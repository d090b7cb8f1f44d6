"""The channel over Celery and Redis: tasks go through the queue, ciphertexts lie beside it as blobs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from time import monotonic, sleep
from typing import TypeVar

from hetrain.public.broker.blobs import BlobStore
from hetrain.public.broker.connection import ping
from hetrain.public.broker.server_info import ask_broker
from hetrain.public.errors import (
    BlobMissing,
    BrokerError,
    BrokerUnreachable,
    HetrainError,
    Interrupted,
    UsageError,
)
from hetrain.public.protocol import keys
from hetrain.public.protocol.messages import Blob, Completion, EvaluateTask, Header, PrepareTask, new_token
from hetrain.public.protocol.plan import parse_plan
from hetrain.public.protocol.product import Operand, Part, Product
from hetrain.public.protocol.tenants import new_job
from hetrain.transport.channel import NO_HEADER, Accept, Reply, accept_any
from hetrain.transport.requests.cleanup import JobKeys
from hetrain.transport.requests.collector import Collector
from hetrain.transport.requests.job_connection import JobConnection
from hetrain.transport.requests.sender import Sender
from hetrain.transport.requests.state import Request, Source, Timeouts, evaluate_task, prepare_task
from hetrain.transport.scheduling.flow_control import ByteBudget, FlowControl, share_of
from hetrain.transport.scheduling.partition import partition
from hetrain.transport.scheduling.registry import WorkerRegistry
from hetrain.transport.scheduling.router import Router

MAX_REPLY_BYTES = 1 << 30
_RETRY_PAUSE_S = 0.5
_POLL_S = 0.1

T = TypeVar("T")


def _all_well() -> None:
    return None


class CeleryChannel:
    """A job's way to the workers; see `Channel`.

    Args:
        url: the broker's address.
        job: the job's token; a fresh one by default.
        timeouts: how long to wait for what.
        health_check: says what became of processes that this client depends on (see `Embedded.failure`).
        max_reply_bytes: the largest result that is accepted for one task.
        max_bytes_in_flight: the most that operands and results may take in the broker at once; None takes a
            share of its memory, and lets a request that is larger than that travel alone.

    Raises:
        UsageError: the URL makes no sense.
        BrokerUnreachable: the broker does not answer.
        BrokerFull: the broker has no memory even for small messages, for as long as the channel is patient.
    """

    def __init__(
        self,
        url: str,
        *,
        job: str | None = None,
        timeouts: Timeouts | None = None,
        health_check: Callable[[], HetrainError | None] = _all_well,
        max_reply_bytes: int = MAX_REPLY_BYTES,
        max_bytes_in_flight: int | None = None,
    ) -> None:
        ping(url)
        limit = max_bytes_in_flight or share_of(ask_broker(url).maxmemory)
        self._flow_control = FlowControl(ByteBudget(limit, strict=max_bytes_in_flight is not None))
        timeouts = timeouts or Timeouts()
        self.job = job or new_job()
        self._connection = JobConnection(
            url, self.job, BlobStore(url, full_s=timeouts.full_s), Sender(url), timeouts
        )
        self._max_reply_bytes = max_reply_bytes
        self._job_keys = JobKeys(self._connection)
        self._router = Router(WorkerRegistry(self._connection), url)
        self._collector = Collector(self._connection, self._router, health_check)
        self._prepared: PrepareTask | None = None
        self._closed = False
        try:
            self._collector.start()
        except BaseException:
            self._connection.close()
            raise

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
        result_bytes = product.n * operand.result_row_bytes
        reservation = self._flow_control.reserve(product.key, operand.nbytes, result_bytes)
        nbytes: int | None = None
        try:
            blob, requests = self._ship(product, operand)
            try:
                parts = self._collect(requests, accept)
                nbytes = sum(part.data.nbytes for part in parts)
            finally:
                self._forget(requests, [blob])
        finally:
            reservation.release(nbytes)
        return Reply(tuple(sorted(parts, key=lambda part: part.rows)), blob.nbytes)

    def _ship(self, product: Product, operand: Operand) -> tuple[Blob, list[Request]]:
        """Uploads the operand and sends one request for each range of rows."""
        self._collector.check()
        prepared = self._prepared
        if prepared is None:
            raise UsageError("the channel must be prepared before something is sent")
        pieces = self._router.pieces(
            product.group.name, product.n * operand.nbytes, 1 + self._collector.count_products()
        )
        token = new_token()
        blob = self._patiently(lambda: self._connection.store.put(self.job, "in", token, operand.payload))
        source = Source(blob, operand.payload)
        done_event = threading.Event()
        requests = [
            Request(
                evaluate_task(prepared, new_token(), product, operand.header, rows, blob),
                source,
                self._connection.timeouts.run_s,
                done_event=done_event,
            )
            for rows in partition(product.n, pieces, operand.row_step)
        ]
        try:
            self._submit(requests)
        except BaseException:
            self._forget(requests, [blob])
            raise
        return blob, requests

    def _collect(self, requests: Sequence[Request], accept: Accept) -> list[Part]:
        """The requests' results in the order in which they arrive, each accepted."""
        parts, left = [], list(requests)
        while left:
            request = self._collector.wait_any(left)
            left.remove(request)
            completion, data = self._fetch(request)
            assert isinstance(request.task, EvaluateTask)
            rows = request.task.start, request.task.stop
            part = Part(rows, data, completion.worker, completion.device, completion.seconds)
            accept(part)
            parts.append(part)
        return parts

    def close(self) -> None:
        """See `Channel.close`."""
        if self._closed:
            return
        self._closed = True
        reason = Interrupted("the channel was closed")
        self._collector.stop(reason)
        self._flow_control.budget.close(reason)
        with suppress(BrokerError), self._connection.errors():
            pipe = self._connection.client.pipeline(transaction=True)
            pipe.rpush(keys.done_list(self.job), "")  # wakes the collector
            pipe.expire(keys.done_list(self.job), keys.DONE_TTL_S)
            pipe.execute()
        # A collector in the middle of a round would take a missing `alive` key for a broker that restarted.
        self._collector.join(5.0)
        with suppress(BrokerError):
            self._job_keys.declare_dead()
            self._job_keys.remove_all(self._collector.remaining())
        self._connection.close()

    def _agree(self, task: PrepareTask) -> Completion:
        """Waits until a worker of every queue that serves a part of the plan has agreed to it.

        Raises: what a worker refuses with; `NoWorker` when a part stays without any.
        """
        asked: dict[str, Request] = {}
        missing: tuple[int, ...] = ()
        missing_at = 0.0
        timeouts = self._connection.timeouts
        try:
            while True:
                coverage = self._router.coverage()
                for queue in set(coverage.queues) - set(asked):
                    copy = task.model_copy(update={"request": new_token()})
                    asked[queue] = Request(copy, None, timeouts.prepare_s, queue=queue)
                    self._submit([asked[queue]])
                answers = [asked[queue].outcome(_POLL_S) for queue in coverage.queues]
                agreed = [answer for answer in answers if answer is not None]
                if agreed and len(agreed) == len(answers) and not coverage.missing:
                    return agreed[0]
                self._collector.check()
                if coverage.missing != missing:
                    missing, missing_at = coverage.missing, monotonic()
                if missing:  # workers may still be starting
                    if monotonic() - missing_at > timeouts.no_worker_s:
                        raise self._router.not_served(missing, timeouts.no_worker_s)
                    sleep(_POLL_S)
        finally:
            self._forget(list(asked.values()), [])

    def _submit(self, requests: Sequence[Request]) -> None:
        self._collector.add(requests)
        for request in requests:
            self._collector.assign(request)
            request.mark_sent()  # first: a broker that restarts now must not be missed
            self._patiently(
                partial(self._connection.sender.send, request, full_s=self._connection.timeouts.full_s)
            )

    def _forget(self, requests: Sequence[Request], operands: Sequence[Blob]) -> None:
        self._collector.remove(requests)
        with suppress(BrokerError):  # they expire anyway
            self._job_keys.remove(requests, operands)

    def _patiently(self, attempt: Callable[[], T]) -> T:
        """Calls `attempt` until the broker can be reached, within the limits of patience."""
        end = monotonic() + self._connection.timeouts.outage_s
        while True:
            self._collector.check()
            try:
                return attempt()
            except BrokerUnreachable:
                if monotonic() > end:
                    raise
                sleep(_RETRY_PAUSE_S)

    def _fetch(self, request: Request) -> tuple[Completion, memoryview]:
        """Waits for a request and downloads its result, and has it run again if that was lost."""
        while True:
            completion = self._collector.wait(request)
            try:
                data = self._patiently(partial(self._download, completion))
            except BlobMissing:
                if request.resends >= self._connection.timeouts.attempts:
                    raise
                self._patiently(partial(self._collector.ask_again, request))
            else:
                return completion, data

    def _download(self, completion: Completion) -> memoryview:
        assert completion.output is not None  # the collector has checked
        return self._connection.store.get(completion.output, limit=self._max_reply_bytes)
