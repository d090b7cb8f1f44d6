"""What is deleted of a job's keys when the connection is cut in the middle of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from hetrain.public.broker.blobs import BlobStore
from hetrain.public.errors import BrokerUnreachable
from hetrain.public.protocol import keys
from hetrain.public.protocol.messages import new_token
from hetrain.transport.requests.cleanup import JobKeys
from hetrain.transport.requests.job_connection import JobConnection
from hetrain.transport.requests.request import Timeouts
from hetrain.transport.requests.sender import Sender
from hetrain.transport.requests.state import RequestState, sent
from tests.harness.processes import BrokerServer, broker_server
from tests.harness.relay import Relay
from tests.harness.request_orders import REQUEST

COUNT = 100
# As many names are longer than this, and nothing else is.
CUT_BYTES = 6000


@pytest.fixture(scope="module")
def served() -> Iterator[BrokerServer]:
    with broker_server() as server:
        yield server


def test_what_a_cut_connection_left_is_deleted_by_the_next_call(served: BrokerServer, tmp_path: Path) -> None:
    relay = Relay(tmp_path / "relay.sock", served.directory / "broker.sock")
    url = served.url.replace(str(served.directory / "broker.sock"), str(tmp_path / "relay.sock"))
    store, job = BlobStore(url), REQUEST.task.job
    with closing(relay), closing(JobConnection(url, job, store, Sender(url), Timeouts())) as connection:
        job_keys, states = JobKeys(connection), [_finished(store, job) for _ in range(COUNT)]
        repeated = replace(_finished(store, job), sends=2)
        relay.cut_next(is_request=True, nbytes=CUT_BYTES)
        with pytest.raises(BrokerUnreachable):
            job_keys.forget([*states, repeated])
        assert len(_left(store, job)) == COUNT + 1
        job_keys.forget([])
        assert _left(store, job) == [keys.finished(job, repeated.request.id)]
        job_keys.remove_all([])
        assert _left(store, job) == []


def _finished(store: BlobStore, job: str) -> RequestState:
    task = REQUEST.task.model_copy(update={"request": new_token()})
    store.client.set(keys.finished(job, task.request), "{}", ex=60)
    return sent(replace(REQUEST, task=task), "gpu", now=0.0)


def _left(store: BlobStore, job: str) -> list[str]:
    return [name.decode() for name in store.client.keys(f"hetrain:{job}:*")]
