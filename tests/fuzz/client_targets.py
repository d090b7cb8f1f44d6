"""What a client reads that a worker, a tenant or the broker may have written: reports, results, replies."""

from __future__ import annotations

import socket
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from redis.exceptions import RedisError

from hetrain.public.broker.blobs import BlobStore
from hetrain.public.broker.connection import broker_errors
from hetrain.public.broker.resp import Replies
from hetrain.public.broker.server_info import ask_broker
from hetrain.public.errors import BrokerError, ResultRejected, WireError
from hetrain.public.lattice.parameters import SLOTS
from hetrain.public.lattice.ring import LANES
from hetrain.public.protocol import keys
from hetrain.public.protocol.messages import Blob, Completion, EngineReport, Failure, WorkerReport, parse
from hetrain.public.protocol.product import Part
from hetrain.public.protocol.registration import WorkerRegistration, read_registration
from hetrain.secret.engines.rlwe.hints import HintClaim, hint_operand
from hetrain.secret.verification.parts import PartsCheck
from hetrain.transport.requests.decision import Progress, decide
from hetrain.transport.requests.request import Request, Timeouts
from hetrain.transport.requests.state import event_of, observe, sent
from hetrain.transport.scheduling.registry import Workers
from tests.fuzz.run import Opened, Target
from tests.fuzz.worker_targets import TOKEN, evaluate_task
from tests.harness.checkpoints import load_matrices, plan_of, save_matrices

_WEIGHTS = {"one": (20, 24)}
_LONGEST_REPLY = 100_000
"""A pair of sockets holds so much without a reader."""
_HELLO = 1 << 12


def _completion(directory: Path, _: ExitStack) -> Opened:
    """A message of the done-list, and what becomes of the request of which it speaks."""
    save_matrices(directory / "tiny")
    plan = plan_of(load_matrices(directory / "tiny"))
    request = Request(evaluate_task(plan, "clear", {}, 72), None, 600.0)
    output = Blob(job=TOKEN, kind="out", token=keys.output_token(TOKEN, "w@host"), nbytes=800)
    common: dict[str, Any] = {"request": TOKEN, "worker": "w@host", "device": "cpu", "seconds": 0.1}
    failure = Failure(error="TaskFailed", what="it broke", where="here", hint="mend it")
    messages = [
        Completion(**common, state="started"),
        Completion(**common, state="done", output=output),
        *(Completion(**common, state="failed", failure=failure.model_copy(update={"error": name}))
          for name in ("TaskFailed", "BlobMissing", "WorkerRefused")),
    ]  # fmt: skip

    def run(data: bytes) -> object:
        event = event_of(parse(Completion, data, where="done-list"), request)
        state = observe(sent(request, "gpu", 0.0), event, 1.0)
        if state.error is not None and not str(state.error).isprintable():
            raise AssertionError("an error that is not printable")
        progress = Progress(0.0).after(state, event, 1.0)
        return decide(state, {"w@host": "gpu"}, progress, 2.0, Timeouts())

    return Opened([message.to_json().encode() for message in messages], run)


def _registration(_: Path, __: ExitStack) -> Opened:
    seeds = [
        WorkerRegistration(
            worker="a@host", device="cpu", queue=queue, models=("tiny", "other"), shards=shards, concurrency=1
        )
        for queue, shards in (("gpu", None), ("gpu.0-7of32", "0-7/32"))
    ]

    def run(data: bytes) -> object:
        registration = read_registration(data)
        workers = Workers((registration,))
        return workers.knows("tiny"), workers.serving("tiny", 3, 30), str(registration)

    return Opened([seed.model_dump_json().encode() for seed in seeds], run)


def _report(_: Path, __: ExitStack) -> Opened:
    report = WorkerReport(
        worker="a@host",
        hostname="host",
        hetrain="0.2.0",
        device="cpu",
        engines=[EngineReport(name="rlwe", state="ready", description="cpu int8")],
        models=["tiny"],
        shards="0-7/32",
        queues=["gpu"],
        concurrency=1,
    )
    return Opened([report.to_json().encode()], lambda data: parse(WorkerReport, data, where="worker a"))


def _changed(right: memoryview, difference: bytes) -> memoryview:
    """`right` with these differences, and of their length: what is right is drawn anew at every start."""
    data = np.frombuffer(difference, np.uint8).copy()
    shared = min(len(data), len(right))
    data[:shared] ^= np.frombuffer(right, np.uint8)[:shared]
    return data.data


def _result(engine: str, directory: Path) -> Opened:
    """A result in one part, and as the second of two parts, by its difference from what is right."""
    from tests.harness.engine import EngineHarness  # starts threads, which no fork survives

    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in _WEIGHTS.items()}
    harness = EngineHarness(engine, weights, directory / "tiny")
    x = torch.randn(5, 24, generator=generator)
    alone, shared = harness.seal("one", "forward", x), harness.seal("one", "forward", x)
    (whole,) = harness.answer("one", "forward", alone)
    first, second = harness.answer("one", "forward", shared, [(0, 12), (12, 20)])

    def run(data: bytes) -> object:
        shared.opening.check(Part(first.rows, first.data, "honest"))
        try:
            shared.opening.check(Part(second.rows, _changed(second.data, data), "other"))
        except ResultRejected as error:
            if error.workers != ("other",):
                raise AssertionError(f"{error.workers} are blamed") from error
        alone.opening.check(Part(whole.rows, _changed(whole.data, data), "other"))
        return alone.opening.open()

    return Opened([bytes(len(whole.data)), bytes(len(second.data))], run)


def _hint(directory: Path, _: ExitStack) -> Opened:
    """A worker's answer where a hint is asked for, by its difference from what is right."""
    from tests.harness.engine import EngineHarness  # starts threads, which no fork survives

    generator = torch.Generator().manual_seed(1)
    harness = EngineHarness("rlwe", {"one": torch.randn(12, 24, generator=generator)}, directory / "tiny")
    product = harness.product("one", "forward")
    seed = harness.hints.hint(product).seed
    claim = HintClaim(product, seed, harness.weights)
    asked = hint_operand(product, seed)
    sealed = harness.seal("one", "forward", torch.randn(1, 24, generator=generator))
    payload = b"".join(asked.payload)
    (right,) = harness.answer("one", "forward", sealed, payload=payload, header=asked.header)

    def run(data: bytes) -> object:
        check = PartsCheck(product, claim, harness.weights)
        check.add(Part(right.rows, _changed(right.data, data), "worker"))
        words = np.frombuffer(data, np.int32).reshape(-1, SLOTS, LANES)
        if words.transpose(0, 2, 1).reshape(-1, SLOTS)[: right.n].any():
            raise AssertionError("a wrong hint was taken")
        return check.results()

    return Opened([bytes(len(right.data))], run)


def _resp(_: Path, __: ExitStack) -> Opened:
    """Replies to GET and SET, in the order in which the reader of large values expects them."""

    def run(data: bytes) -> object:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            replies, target = Replies(ours), memoryview(bytearray(5))
            replies.value_into(target)
            replies.ok()
            return replies.count(), bytes(target)

    return Opened([b"$5\r\nhello\r\n+OK\r\n:2\r\n", b"$-1\r\n+OK\r\n:0\r\n", b"-OOM no memory\r\n"], run)


class _Broker:
    """Answers whatever is sent to it with the replies of a case, and then hangs up."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.replies = b""
        self._server = stack.enter_context(socket.socket(socket.AF_UNIX))
        self._server.bind(str(directory / "broker.sock"))
        self._server.listen()
        self.url = f"unix://{directory / 'broker.sock'}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                connection.settimeout(5)
                while b"SETINFO" in (asked := connection.recv(_HELLO)):  # redis-py's name and version
                    connection.sendall(b"+OK\r\n" * asked.count(b"SETINFO"))
                connection.sendall(self.replies)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(_HELLO):
                    pass


def _broker(directory: Path, stack: ExitStack) -> Opened:
    """A broker's replies to what client and worker ask through redis-py, the first byte saying what."""
    broker = _Broker(directory, stack)
    blob = Blob(job=TOKEN, kind="out", token=TOKEN, nbytes=5)

    def run(data: bytes) -> object:
        broker.replies = data[1:]
        store = BlobStore(broker.url, full_s=0.0)
        try:
            match data[:1]:
                case b"i":
                    return ask_broker(broker.url, pings=1)
                case b"g":
                    return store.get(blob)
                case b"p":
                    return store.put(TOKEN, "in", TOKEN, [b"hello"], then=("LLEN", "x"))
            with broker_errors(broker.url):
                match data[:1]:
                    case b"t":
                        seconds, microseconds = store.client.time()
                        return seconds + microseconds / 1e6
                    case b"z":
                        return store.client.zrangebyscore("hetrain:workers", 0, 1, start=0, num=9)
                    case b"m":
                        return store.client.mget(["a", "b"])
                popped: Any = store.client.blmpop(1.0, 1, "a", direction="LEFT", count=9)
                return popped[1] if popped else []
        finally:
            store.close()

    info = (
        b"# Server\r\nvalkey_version:9.1.0\r\nmaxmemory:5\r\nused_memory:1\r\nmaxmemory_policy:noeviction\r\n"
    )
    info += b"db0:keys=1,expires=0,avg_ttl=0\r\nlatency_percentiles_usec_get:p50=1.0,p99=2.0\r\n"
    replies = {
        b"i": b"$%d\r\n%s\r\n+PONG\r\n" % (len(info), info),
        b"g": b"$5\r\nhello\r\n",
        b"p": b"+OK\r\n:1\r\n",
        b"t": b"*2\r\n$10\r\n1795993409\r\n$1\r\n5\r\n",
        b"z": b"*2\r\n$2\r\n{}\r\n$1\r\nx\r\n",
        b"m": b"*2\r\n$-1\r\n$2\r\n{}\r\n",
        b"l": b"*2\r\n$1\r\na\r\n*1\r\n$2\r\n{}\r\n",
    }
    return Opened([kind + reply for kind, reply in replies.items()], run)


CLIENT_TARGETS = (
    Target("completion", _completion, (WireError,)),
    Target("registration", _registration, (WireError,)),
    Target("worker-report", _report, (WireError,)),
    Target("result-clear", lambda path, _: _result("clear", path), (ResultRejected, WireError), multiple=300),
    Target("result-rlwe", lambda path, _: _result("rlwe", path), (ResultRejected, WireError), multiple=300),
    Target("result-hint", _hint, (ResultRejected, WireError), longest=1 << 17, multiple=300),
    Target("resp", _resp, (WireError, RedisError, OSError), longest=_LONGEST_REPLY, lines=True),
    Target("broker-replies", _broker, (BrokerError, WireError), longest=_LONGEST_REPLY),
)
