"""Broker addresses, and the reader of a broker's replies against a hostile peer."""

from __future__ import annotations

import socket
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.exceptions import RedisError

from hetrain.public.broker.connection import parse_broker_url
from hetrain.public.broker.resp import Replies
from hetrain.public.errors import UsageError, WireError
from hetrain.public.protocol.messages import Completion, EvaluateTask, PrepareTask, WorkerReport, parse
from hetrain.public.protocol.plan import Plan
from hetrain.public.protocol.registration import WorkerRegistration


@pytest.mark.parametrize(
    ("url", "redis", "celery"),
    [
        ("redis://localhost", "redis://localhost/0", "redis://localhost/0"),
        ("redis://u:p%40@h:1/2", "redis://u:p%40@h:1/2", "redis://u:p%40@h:1/2"),
        ("rediss://:p@h:1/0", "rediss://:p@h:1/0", "rediss://:p@h:1/0?ssl_cert_reqs=required"),
        (
            "rediss://h?ssl_cert_reqs=none&db=3",
            "rediss://h/3?ssl_cert_reqs=none",
            "rediss://h/3?ssl_cert_reqs=none",
        ),
        (
            "unix://:p@/a/b.sock?db=1",
            "unix://:p@/a/b.sock?db=1",
            "redis+socket://:p@/a/b.sock?virtual_host=1",
        ),
        ("redis+socket:///a/b.sock", "unix:///a/b.sock?db=0", "redis+socket:///a/b.sock"),
    ],
)
def test_broker_addresses(url: str, redis: str, celery: str) -> None:
    parsed = parse_broker_url(url)
    assert (parsed.for_redis(), parsed.for_celery()) == (redis, celery)
    assert parse_broker_url(celery) == parse_broker_url(parsed.for_celery())


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost",
        "http://:s3cret@h",
        "amqp://u:s3cret@h//",
        "redis://",
        "redis://:s3cret@h:port/0",
        "redis://:s3cret@h:0/0",
        "redis://:s3cret@a..b/0",
        f"redis://:s3cret@{'a' * 64}.org/0",
        "redis://:s3cret@h/x",
        "redis://:pa/s3cret@h:1/0",
        "unix://:s3cret@host/path",
        "unix://",
        "redis://h?password=s3cret",
    ],
)
def test_senseless_addresses_are_refused_without_their_password(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_broker_url(url)
    assert "s3cret" not in str(caught.value)


def test_another_wire_version_is_named_as_such_whatever_else_differs() -> None:
    for kind in (PrepareTask, EvaluateTask, Completion, WorkerReport, WorkerRegistration, Plan):
        with pytest.raises(WireError, match=r"wire version 1 is not spoken here, only 2 \(a ") as caught:
            parse(kind, '{"version": 1, "old": true}', where="message")
        assert "install the same version" in caught.value.hint


_LINES = st.sampled_from(
    [
        b"+OK",
        b"$-1",
        b"$5",
        b"$0",
        b"$99999999999",
        b"$4294967296",
        b"$-5",
        b"$ 5",
        b"$5_0",
        b"*3",
        b":1",
        b"-OOM x",
    ]
)
_NOISE = st.binary(max_size=40) | st.builds(lambda line: line + b"\r\n", _LINES) | st.just(b"hello\r\n")


@settings(max_examples=300, deadline=None)
@given(st.lists(_NOISE, max_size=8).map(b"".join))
def test_whatever_the_peer_sends_the_reader_ends(noise: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(noise)
        theirs.shutdown(socket.SHUT_WR)
        replies, target = Replies(ours), memoryview(bytearray(5))
        try:
            found = replies.value_into(target)
            replies.ok()
        except (WireError, RedisError, OSError):
            return
        assert noise.startswith(b"$5\r\n" + bytes(target) + b"\r\n+OK\r\n" if found else b"$-1\r\n+OK\r\n")


def test_an_endless_line_is_cut_off() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"$" + b"1" * 20_000)
        tracemalloc.start()
        with pytest.raises(WireError, match="endless"):
            Replies(ours).ok()
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
