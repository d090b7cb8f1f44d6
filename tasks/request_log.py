"""What a worker writes down about a request: that it began, that it ended, and how."""

from __future__ import annotations

from hetrain.public.broker.blobs import BlobStore
from hetrain.public.broker.connection import FULL_S, broker_errors, while_full
from hetrain.public.errors import BrokerFull
from hetrain.public.protocol import keys
from hetrain.public.protocol.messages import Completion


class RequestLog:
    """The bookkeeping of one worker process, in the broker. Methods raise `BrokerError`.

    They wait for a full broker's memory for `FULL_S` seconds.

    Args:
        url: the broker's address.
        store: its connections are used.
    """

    def __init__(self, url: str, store: BlobStore) -> None:
        self._url = url
        self._client = store.client

    def is_wanted(self, job: str, request: str) -> bool:
        """Whether the request still has to be run.

        A client that has gone wants nothing. A client that asks again for a finished request has missed its
        completion, so it is repeated.
        """
        with broker_errors(self._url):
            pipe = self._client.pipeline(transaction=False)
            pipe.exists(keys.alive(job))
            pipe.get(keys.finished(job, request))
            alive, completion = pipe.execute()
        if alive and completion is not None:
            self._repeat(job, completion)
        return bool(alive) and completion is None

    def _repeat(self, job: str, completion: bytes) -> None:
        def attempt() -> None:
            with broker_errors(self._url):
                pipe = self._client.pipeline(transaction=True)
                pipe.rpush(keys.done_list(job), completion)
                pipe.expire(keys.done_list(job), keys.DONE_TTL_S)
                pipe.execute()

        while_full(attempt, limit_s=FULL_S)

    def begin(self, job: str, completion: Completion) -> int:
        """Reports the start of a request. Returns how often it has been begun, this time included."""

        def attempt() -> int:
            with broker_errors(self._url):
                pipe = self._client.pipeline(transaction=True)
                counter = keys.tries(job, completion.request)
                pipe.incr(counter)
                pipe.expire(counter, keys.TRIES_TTL_S)
                pipe.rpush(keys.done_list(job), completion.to_json())
                pipe.expire(keys.done_list(job), keys.DONE_TTL_S)
                return int(pipe.execute()[0])

        return while_full(attempt, limit_s=FULL_S)

    def end(self, job: str, completion: Completion) -> None:
        """Reports the end of a request, and gives its lease back, in one transaction.

        Only success is final: a failed request may be asked for again, say after its input was lost.
        """
        message, lease = completion.to_json(), keys.lease(job, completion.request)

        def attempt() -> None:
            with broker_errors(self._url):
                pipe = self._client.pipeline(transaction=True)
                if completion.state == "done":
                    pipe.set(keys.finished(job, completion.request), message, ex=keys.FINISHED_TTL_S)
                    pipe.delete(keys.tries(job, completion.request))
                pipe.rpush(keys.done_list(job), message)
                pipe.expire(keys.done_list(job), keys.DONE_TTL_S)
                pipe.delete(lease)
                pipe.execute()

        def attempt_and_keep_lease() -> None:
            try:
                attempt()
            except BrokerFull:
                with broker_errors(self._url):
                    # It works without memory. A lease that ran out would mean that this worker has died.
                    self._client.pexpire(lease, keys.LEASE_TTL_MS)
                raise

        while_full(attempt_and_keep_lease, limit_s=FULL_S)
