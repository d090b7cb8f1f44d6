"""The channel over Celery and Redis: tasks go through the queue, ciphertexts lie beside it as blobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from time import monotonic, sleep
from typing import TypeVar

from hetrain.public import keys
from hetrain.public.blobs import BlobStore
from hetrain.public.broker import ping
from hetrain.public.errors import (
    BlobMissing,
    BrokerError,
    BrokerUnreachable,
    HetrainError,
    Interrupted,
    UsageError,
)
from hetrain.public.wire import Blob, Completion, Direction, Header, PrepareTask, new_token
from hetrain.transport.channel import NO_HEADER, Reply, Rows
from hetrain.transport.collector import Collector
from hetrain.transport.link import Link
from hetrain.transport.requests import Patience, Request, Source, evaluate_task, prepare_task
from hetrain.transport.sender import Sender

MAX_REPLY_BYTES = 1 << 30
_RETRY_PAUSE_S = 0.5

T = TypeVar("T")


def _all_well() -> None:
    return None


class QueueChannel:
    """A job's way to the workers; see `Channel`.

    Args:
        url: the broker's address.
        job: the job's token; a fresh one by default.
        patience: how long to wait for what.
        watch: says what became of processes that this client depends on (see `Embedded.failure`).
        max_reply_bytes: the largest result that is accepted for one task.

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
        patience: Patience | None = None,
        watch: Callable[[], HetrainError | None] = _all_well,
        max_reply_bytes: int = MAX_REPLY_BYTES,
    ) -> None:
        ping(url)
        patience = patience or Patience()
        self.job = job or new_token()
        self._link = Link(url, self.job, BlobStore(url, full_s=patience.full_s), Sender(url), patience)
        self._max_reply_bytes = max_reply_bytes
        self._collector = Collector(self._link, watch)
        self._prepared: PrepareTask | None = None
        self._closed = False
        try:
            self._collector.start()
        except BaseException:
            self._link.close()
            raise

    def prepare(
        self, model: str, engine: str, plan: bytes, plan_digest: str, setup: Header = NO_HEADER
    ) -> Completion:
        """See `Channel.prepare`."""
        parts = [memoryview(plan)]
        blob = self._patiently(lambda: self._link.store.put(self.job, "plan", plan_digest, parts))
        self._collector.keep(Source(blob, parts))
        task = prepare_task(model, engine, blob, setup)
        request = Request(task, None, self._link.patience.prepare_s)
        try:
            self._submit([request])
            completion = self._collector.wait(request)
        finally:
            self._collector.remove([request])
        self._prepared = task
        return completion

    def send(
        self,
        group: str,
        direction: Direction,
        header: Header,
        payload: Sequence[memoryview],
        rows: Sequence[Rows],
    ) -> QueuePending:
        """See `Channel.send`."""
        self._collector.check()
        prepared = self._prepared
        if prepared is None:
            raise UsageError("the channel must be prepared before something is sent")
        token = new_token()
        blob = self._patiently(lambda: self._link.store.put(self.job, "in", token, payload))
        source = Source(blob, payload)
        requests = [
            Request(
                evaluate_task(prepared, new_token(), group, direction, header, part, blob),
                source,
                self._link.patience.run_s,
            )
            for part in rows
        ]
        try:
            self._submit(requests)
        except BaseException:
            self._forget(requests, [blob])
            raise
        return QueuePending(self, requests, blob)

    def close(self) -> None:
        """See `Channel.close`."""
        if self._closed:
            return
        self._closed = True
        self._collector.stop(Interrupted("the channel was closed"))
        with suppress(BrokerError), self._link.errors():
            pipe = self._link.client.pipeline(transaction=True)
            pipe.rpush(keys.done_list(self.job), "")  # wakes the collector
            pipe.expire(keys.done_list(self.job), keys.DONE_TTL_S)
            pipe.execute()
        # A collector in the middle of a round would take a missing `alive` key for a broker that restarted.
        self._collector.join(5.0)
        with suppress(BrokerError), self._link.errors():
            client = self._link.client
            # First of all: without its `alive` key workers drop what is still queued.
            client.unlink(keys.alive(self.job))
            names = list(client.scan_iter(f"hetrain:{self.job}:*", count=1000))
            if names:
                client.unlink(*names)
        self._link.close()

    def _submit(self, requests: Sequence[Request]) -> None:
        self._collector.add(requests)
        for request in requests:
            request.mark_sent()  # first: a broker that restarts now must not be missed
            self._patiently(partial(self._link.sender.send, request, full_s=self._link.patience.full_s))

    def _forget(self, requests: Sequence[Request], blobs: Sequence[Blob]) -> None:
        self._collector.remove(requests)
        with suppress(BrokerError):  # they expire anyway
            self._link.store.delete(blobs)

    def _patiently(self, attempt: Callable[[], T]) -> T:
        """Calls `attempt` until the broker can be reached, within the limits of patience."""
        end = monotonic() + self._link.patience.outage_s
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
                if request.resends >= self._link.patience.attempts:
                    raise
                self._patiently(partial(self._collector.ask_again, request))
            else:
                return completion, data

    def _download(self, completion: Completion) -> memoryview:
        assert completion.output is not None  # the collector has checked
        return self._link.store.get(completion.output, limit=self._max_reply_bytes)


class QueuePending:
    """See `Pending`."""

    def __init__(self, channel: QueueChannel, requests: Sequence[Request], operand: Blob) -> None:
        self._channel = channel
        self._requests = requests
        self._operand = operand

    def result(self) -> Reply:
        """See `Pending.result`."""
        parts: list[memoryview] = []
        completions: list[Completion] = []
        blobs = [self._operand]
        try:
            for request in self._requests:
                completion, data = self._channel._fetch(request)
                completions.append(completion)
                parts.append(data)
                if completion.output is not None:
                    blobs.append(completion.output)
        finally:
            self._channel._forget(self._requests, blobs)
        return Reply(
            parts=parts,
            bytes_up=self._operand.nbytes,
            bytes_down=sum(part.nbytes for part in parts),
            server_s=sum(completion.seconds for completion in completions),
            device=", ".join(sorted({completion.device for completion in completions})),
        )
