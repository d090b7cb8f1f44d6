"""Blobs in a real Valkey server."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from hetrain.public.broker.blobs import CHUNK_BYTES, BlobStore
from hetrain.public.broker.connection import ping, redacted
from hetrain.public.errors import (
    BlobMissing,
    BrokerError,
    BrokerFull,
    BrokerUnreachable,
    WireError,
)
from hetrain.public.protocol import keys
from hetrain.public.protocol.messages import Blob, new_token
from tests.harness.processes import broker_server

JOB = new_token()
LIMIT = 64 << 20


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with broker_server(maxmemory=LIMIT) as server:
        yield server.url


@pytest.fixture
def store(url: str) -> Iterator[BlobStore]:
    blobs = BlobStore(url, full_s=0.3)
    yield blobs
    blobs.client.flushall()
    blobs.close()


SIZES = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 13_000_000]


@pytest.mark.parametrize("nbytes", SIZES)
def test_a_blob_comes_back_as_the_concatenation_of_its_parts(store: BlobStore, nbytes: int) -> None:
    data = os.urandom(nbytes)
    cuts = [0, nbytes // 3, nbytes // 3, nbytes - nbytes // 7, nbytes]
    parts = [memoryview(data)[a:b] for a, b in pairwise(cuts)]
    blob = store.put(JOB, "in", new_token(), parts)
    assert blob.nbytes == nbytes
    assert store.get(blob) == data
    names = store.client.keys("hetrain:*")
    assert len(names) == max(1, -(-nbytes // CHUNK_BYTES))
    assert all(0 < store.client.ttl(name) <= keys.BLOB_TTL_S for name in names)
    store.delete([blob])
    assert store.client.dbsize() == 0
    with pytest.raises(BlobMissing):
        store.get(blob)


def test_many_threads_share_a_store(store: BlobStore) -> None:
    data = [os.urandom(200_000 + index) for index in range(8)]
    wrong = []

    def work(index: int) -> None:
        for _ in range(10):
            blob = store.put(JOB, "in", new_token(), [data[index]])
            if store.get(blob) != data[index]:
                wrong.append(index)
            store.delete([blob])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert store.client.dbsize() == 0


def test_damaged_blobs_are_refused_and_the_store_stays_usable(store: BlobStore) -> None:
    blob = store.put(JOB, "in", new_token(), [bytes(3 * CHUNK_BYTES)])
    store.client.delete(keys.chunk(blob, 1))
    with pytest.raises(BlobMissing, match="expired"):
        store.get(blob)
    assert not store.refresh(blob)
    for wrong in (b"", bytes(CHUNK_BYTES - 1), bytes(CHUNK_BYTES + 1)):
        store.client.set(keys.chunk(blob, 1), wrong)
        with pytest.raises(WireError, match="instead of"):
            store.get(blob)
    store.client.delete(keys.chunk(blob, 1))
    store.client.rpush(keys.chunk(blob, 1), "a list")
    with pytest.raises(BrokerError, match="WRONGTYPE"):
        store.get(blob)
    with pytest.raises(WireError, match="larger than"):
        store.get(blob, limit=1000)
    other = store.put(JOB, "in", new_token(), [b"fine"])
    assert store.get(other) == b"fine"


def memory_kb(field: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(field)).split()[1])


def test_a_false_size_costs_no_memory(store: BlobStore) -> None:
    store.put(JOB, "in", token := new_token(), [b"x"])
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here, whatever earlier tests took
    before = memory_kb("VmHWM")
    with pytest.raises(WireError):
        store.get(Blob(job=JOB, kind="in", token=token, nbytes=4 << 30))
    assert memory_kb("VmHWM") - before < 1 << 20


def test_reading_leaves_the_lifetime_alone_and_refresh_renews_it(store: BlobStore) -> None:
    blob = store.put(JOB, "in", new_token(), [b"abc"])
    store.client.expire(keys.chunk(blob, 0), 10)
    store.get(blob)
    assert store.client.ttl(keys.chunk(blob, 0)) <= 10
    assert store.refresh(blob)
    assert store.client.ttl(keys.chunk(blob, 0)) > 10


def test_a_full_broker_is_reported_and_keeps_nothing_of_the_blob(store: BlobStore) -> None:
    with pytest.raises(BrokerFull, match="maxmemory"):
        store.put(JOB, "in", new_token(), [bytes(LIMIT + CHUNK_BYTES)])
    assert store.client.dbsize() == 0


def test_a_full_broker_is_waited_for(store: BlobStore) -> None:
    first = store.put(JOB, "in", new_token(), [bytes(LIMIT // 2)])
    threading.Timer(0.5, store.delete, [[first]]).start()
    data = os.urandom(LIMIT * 3 // 4)
    blob = store.put(JOB, "in", new_token(), [data], full_s=20)
    assert store.get(blob) == data


def test_unreachable_brokers_are_named_without_their_password(url: str) -> None:
    wrong = url.replace("redis+socket://:", "redis+socket://:not-")
    for address in (wrong, "redis://:s3cret-not-@127.0.0.1:1/0", "unix://:s3cret-not-@/nowhere/at.all"):
        with pytest.raises(BrokerUnreachable) as caught:
            ping(address)
        assert "not-" not in str(caught.value)
        assert redacted(address) in str(caught.value)
        with pytest.raises(BrokerUnreachable):
            BlobStore(address).get(Blob(job=JOB, kind="in", token=JOB, nbytes=1))
