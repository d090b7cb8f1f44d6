"""Products in flight: computed by a channel in threads, with a log of what is sent for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import pytest
import redis

from hetrain.public.broker.connection import client, connection_pool
from hetrain.public.protocol.product import Operand, Product
from hetrain.public.protocol.registration import lane_of, lane_queue
from hetrain.transport.celery_channel import CeleryChannel
from hetrain.transport.channel import Accept, Reply, accept_any
from hetrain.transport.requests.request import Request
from hetrain.transport.requests.sender import Sender
from hetrain.transport.scheduling import router
from tests.harness.waiting import eventually

GUARD_S = 60

T = TypeVar("T")


@contextmanager
def broker_client(url: str) -> Iterator[redis.Redis]:
    """A client of the broker at `url`."""
    pool = connection_pool(url)
    try:
        yield client(pool)
    finally:
        pool.disconnect()


def lane(queue: str, channel: CeleryChannel) -> str:
    """Where workers of `queue` that are registered for the model ``tiny`` take the channel's tasks."""
    return lane_queue(queue, "tiny", lane_of(channel.job))


def within_guard(call: Callable[[], T]) -> T:
    """What `call` returns or raises; a call that hangs fails the test."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(call).result(GUARD_S)
    finally:
        pool.shutdown(wait=False)


class InFlight:
    """Multiplies in threads, and remembers every request and the queue to which it was sent, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[tuple[Request, str]] = []
        self._chosen = threading.local()
        send, count_pieces = Sender.send, router.count_pieces

        def recording(sender: Sender, request: Request, queue: str, *, full_s: float) -> None:
            send(sender, request, queue, full_s=full_s)
            self.sent.append((request, queue))

        def chosen(*arguments: object) -> int:
            return getattr(self._chosen, "pieces", None) or count_pieces(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(Sender, "send", recording)
        monkeypatch.setattr(router, "count_pieces", chosen)

    def start(
        self,
        channel: CeleryChannel,
        product: Product,
        operand: Operand,
        *,
        pieces: int | None = None,
        accept: Accept = accept_any,
    ) -> Future[Reply]:
        """Returns as soon as the product's tasks are sent, or it has failed."""
        reply: Future[Reply] = Future()

        def run() -> None:
            self._chosen.pieces = pieces
            try:
                reply.set_result(channel.multiply(product, operand, accept))
            except BaseException as error:  # noqa: BLE001 - whatever it is, the future has it
                reply.set_exception(error)

        before = len(self.sent)
        threading.Thread(target=run, daemon=True).start()
        assert eventually(lambda: len(self.sent) >= before + (pieces or 1) or reply.done())
        return reply

    def sends(self, request: Request) -> int:
        """How often a request was sent."""
        return sum(each is request for each, _ in self.sent)


def has_lease(client: redis.Redis, channel: CeleryChannel) -> bool:
    """Whether a worker runs a task of the channel's job."""
    return bool(client.keys(f"hetrain:{channel.job}:lease:*"))


def keys_of(channel: CeleryChannel, url: str) -> list[bytes]:
    """All keys of the channel's job in the broker."""
    with broker_client(url) as client:
        return client.keys(f"hetrain:{channel.job}:*")
