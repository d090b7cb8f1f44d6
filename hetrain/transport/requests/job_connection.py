"""A job's link to its broker: what the parts of a channel share."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import redis

from hetrain.public.broker.blobs import BlobStore
from hetrain.public.broker.connection import broker_errors
from hetrain.transport.requests.request import Timeouts
from hetrain.transport.requests.sender import Sender


@dataclass(frozen=True)
class JobConnection:
    """A job's link to its broker. Thread-safe.

    Attributes:
        url: the broker's address.
        job: the job's token.
        store: where its blobs lie.
        sender: sends its tasks.
        timeouts: how long to wait for what.
    """

    url: str
    job: str
    store: BlobStore
    sender: Sender
    timeouts: Timeouts

    @property
    def client(self) -> redis.Redis:
        """A client for small commands."""
        return self.store.client

    def errors(self) -> AbstractContextManager[None]:
        """Maps what `client` raises to `BrokerError` and its subclasses."""
        return broker_errors(self.url)

    def close(self) -> None:
        """Closes the connections."""
        self.sender.close()
        self.store.close()
