"""The link to a broker, measured: some megabytes there and back, which are deleted at once."""

from __future__ import annotations

import os
from time import perf_counter

from hetrain.inspection.estimate import Link
from hetrain.public.broker.blobs import BlobStore
from hetrain.public.broker.server_info import ask_broker
from hetrain.public.protocol.messages import Blob, new_token
from hetrain.public.protocol.tenants import new_job

_FIRST_BYTES, _MOST_BYTES = 1 << 20, 32 << 20
_LONG_ENOUGH_S = 1.0
_TTL_S = 60
_PINGS = 5


def measure_link(url: str) -> Link:
    """Sends and fetches blobs of 1 MiB to 32 MiB, growing until one way takes a second.

    The slower way counts, less a round trip, as a job's bytes take both. On one connection, as one product
    travels; several at once may get more out of a long link. It moves 85 MiB each way at most, and expires
    within a minute if it cannot be deleted.

    Raises:
        UsageError: the URL makes no sense.
        BrokerError: the broker cannot be reached, or has no memory for it.
    """
    round_trip = ask_broker(url, pings=_PINGS).round_trip_ms / 1000
    store, job = BlobStore(url, ttl_s=_TTL_S, full_s=0.0), new_job()
    try:
        nbytes = _FIRST_BYTES
        while True:
            seconds = _there_and_back(store, job, nbytes)
            if seconds >= _LONG_ENOUGH_S or nbytes >= _MOST_BYTES:
                return Link(8 * nbytes / max(seconds - round_trip, 1e-9), round_trip)
            nbytes = min(4 * nbytes, _MOST_BYTES)
    finally:
        store.close()


def _there_and_back(store: BlobStore, job: str, nbytes: int) -> float:
    """Seconds of the slower way."""
    data = os.urandom(nbytes)  # nothing on the way can compress it
    blob = Blob(job=job, kind="in", token=new_token(), nbytes=nbytes)
    try:
        begin = perf_counter()
        store.put(job, "in", blob.token, [data])
        there = perf_counter()
        store.get(blob)
        return max(there - begin, perf_counter() - there)
    finally:
        store.delete([blob])
