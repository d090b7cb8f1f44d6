"""Blobs: large byte strings under Redis keys, in chunks, each with a lifetime.

A blob lies under ``{blob.key}:0``, ``{blob.key}:1`` ...: chunks of 4 MiB, the last one shorter; an empty
blob is one empty chunk. Larger values are several times slower, in the server as well as in its clients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Literal

import numpy as np
import redis

from hetrain.public.broker.connection import (
    FULL_S,
    broker_errors,
    client,
    connection_pool,
    redacted,
    while_full,
)
from hetrain.public.broker.resp import Replies
from hetrain.public.errors import BlobMissing, WireError
from hetrain.public.protocol import keys
from hetrain.public.protocol.messages import MAX_BLOB_BYTES, Blob

CHUNK_BYTES = 4 << 20
_COMMANDS_IN_FLIGHT = 2

Buffer = bytes | bytearray | memoryview


class BlobStore:
    """Puts, gets and deletes blobs. Thread-safe: every operation takes a connection of its own.

    Args:
        url: the broker's address.
        ttl_s: lifetime of a blob in seconds.
        full_s: for how many seconds `put` waits for memory.

    All methods raise `BrokerUnreachable` when the broker cannot be reached.
    """

    def __init__(self, url: str, *, ttl_s: int = keys.BLOB_TTL_S, full_s: float = FULL_S) -> None:
        self._url = url
        self._ttl_s = ttl_s
        self._full_s = full_s
        self._pool = connection_pool(url)
        self._client = client(self._pool)

    @property
    def client(self) -> redis.Redis:
        """A client for small commands on the same connections."""
        return self._client

    def put(
        self,
        job: str,
        kind: Literal["plan", "in", "out"],
        token: str,
        parts: Sequence[Buffer],
        *,
        full_s: float | None = None,
        then: Sequence[str | int] = (),
    ) -> Blob:
        """Stores the concatenation of `parts` without building it, all of it or nothing.

        Args:
            job: whose it is.
            kind: what it is.
            token: its name.
            parts: its bytes.
            full_s: for how many seconds to wait for memory.
            then: a command that answers with an integer. It is sent in the same round trip, so it has to
                look itself whether all chunks are there.

        Raises:
            WireError: it is larger than a blob may be.
            BrokerFull: the broker had no memory for it for `full_s` seconds.
        """
        views = [memoryview(part).cast("B") for part in parts if memoryview(part).nbytes]
        nbytes = sum(view.nbytes for view in views)
        if nbytes > MAX_BLOB_BYTES:
            raise WireError(f"a blob of {nbytes} bytes is too large", hint="use smaller micro-batches")
        blob = Blob(job=job, kind=kind, token=token, nbytes=nbytes)
        limit_s = self._full_s if full_s is None else full_s
        while_full(lambda: self._put_once(blob, views, then), limit_s=limit_s)
        return blob

    def get(self, blob: Blob, *, limit: int = MAX_BLOB_BYTES) -> memoryview:
        """The blob's bytes. Its lifetime stays as it is.

        Raises:
            BlobMissing: a chunk has expired or was removed.
            WireError: a chunk has another length than the blob says, or the blob is larger than `limit`.
        """
        return self._get(blob, limit, ())

    def take(self, blob: Blob, others: Iterable[Blob] = (), *, limit: int = MAX_BLOB_BYTES) -> memoryview:
        """The blob's bytes; deletes it, and `others`, in the same round trip. Raises as `get`."""
        return self._get(blob, limit, [name for each in (blob, *others) for name in chunk_keys(each)])

    def _get(self, blob: Blob, limit: int, finished: Sequence[str]) -> memoryview:
        if blob.nbytes > limit:
            raise WireError(f"a blob of {blob.nbytes} bytes is larger than {limit}", where=blob.key)
        # Not zeroed: its pages come into being as bytes arrive, so a false size alone costs no memory.
        data = np.empty(blob.nbytes, np.uint8).data
        targets = [data[start : start + size] for start, size in _chunks(blob.nbytes)]
        commands: list[tuple[str, ...]] = [("GET", name) for name in chunk_keys(blob)]
        if finished:
            commands.append(("UNLINK", *finished))
        with self._connection() as connection:
            replies = Replies(connection._get_socket())
            ahead = iter(commands)
            connection.send_packed_command(connection.pack_commands(islice(ahead, _COMMANDS_IN_FLIGHT)))
            found = []
            for target in targets:
                found.append(replies.value_into(target))
                if command := next(ahead, None):
                    connection.send_command(*command)
            if finished:
                replies.count()
        if not all(found):
            hint = "the broker may have restarted"
            raise BlobMissing("a blob has expired or was removed", where=blob.key, hint=hint)
        return data

    def refresh(self, blob: Blob) -> bool:
        """Starts the blob's lifetime anew; False when a chunk is gone."""
        with broker_errors(self._url):
            pipe = self._client.pipeline(transaction=False)
            for name in chunk_keys(blob):
                pipe.expire(name, self._ttl_s)
            return all(pipe.execute())

    def delete(self, blobs: Iterable[Blob]) -> None:
        """Removes blobs; absent ones do no harm."""
        names = [name for blob in blobs for name in chunk_keys(blob)]
        if names:
            with broker_errors(self._url):
                self._client.unlink(*names)

    def close(self) -> None:
        """Closes the connections."""
        self._pool.disconnect()

    def _put_once(self, blob: Blob, views: list[memoryview], then: Sequence[str | int]) -> None:
        stored: list[str] = []
        refusal: redis.exceptions.OutOfMemoryError | None = None
        names, chunks = chunk_keys(blob), _chunks(blob.nbytes)
        with self._connection() as connection:
            # Replies of SET are a few bytes each: reading them late cannot block the server.
            for name, (start, size) in zip(names, chunks, strict=True):
                after = b"".join(connection.pack_command(*then)) if then and name == names[-1] else b""
                pieces = _slices(views, start, size)
                connection.send_packed_command(_set(name, pieces, size, self._ttl_s, after))
            replies = Replies(connection._get_socket())
            for name in names:
                try:
                    replies.ok()
                    stored.append(name)
                except redis.exceptions.OutOfMemoryError as error:
                    refusal = error
            if then:
                try:
                    replies.count()
                except redis.exceptions.OutOfMemoryError as error:
                    refusal = error
        if refusal is not None:
            with broker_errors(self._url):
                # What is stored would keep its memory from others who wait as well.
                if stored:
                    self._client.unlink(*stored)
                raise refusal

    @contextmanager
    def _connection(self) -> Iterator[redis.Connection]:
        """A connection of its own, closed when the block fails in any way."""
        with broker_errors(self._url):
            connection = self._pool.get_connection()
        try:
            with broker_errors(self._url):
                yield connection
        except WireError as error:
            connection.disconnect()
            raise WireError(error.what, where=error.where or redacted(self._url), hint=error.hint) from error
        except BaseException:
            connection.disconnect()
            raise
        finally:
            self._pool.release(connection)


def _set(key: str, pieces: Iterable[memoryview], nbytes: int, ttl_s: int, after: bytes) -> Iterator[Buffer]:
    """``SET key value EX ttl_s`` in RESP, the value being the `pieces` of `nbytes` bytes in total, uncopied.

    `after` is sent with its last bytes.
    """
    name, ttl = key.encode(), b"%d" % ttl_s
    yield b"*5\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(name), name, nbytes)
    yield from pieces
    yield b"\r\n$2\r\nEX\r\n$%d\r\n%s\r\n%s" % (len(ttl), ttl, after)


def _chunks(nbytes: int) -> list[tuple[int, int]]:
    """(start, size) of every chunk."""
    starts = range(0, max(nbytes, 1), CHUNK_BYTES)
    return [(start, min(CHUNK_BYTES, nbytes - start)) for start in starts]


def chunk_keys(blob: Blob) -> list[str]:
    """The names of the blob's chunks."""
    return [keys.chunk(blob, index) for index in range(len(_chunks(blob.nbytes)))]


def _slices(views: Sequence[memoryview], start: int, size: int) -> Iterator[memoryview]:
    """Bytes ``start : start + size`` of the concatenation of `views`, piece by piece."""
    for view in views:
        if size <= 0:
            return
        if start >= view.nbytes:
            start -= view.nbytes
            continue
        piece = view[start : start + size]
        yield piece
        start, size = 0, size - piece.nbytes
