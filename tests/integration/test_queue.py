"""The queue, end to end: real broker, real supervisor, real worker processes, the `clear` engine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import psutil
import pytest
import redis

from hetrain.local.launcher import Embedded, start_embedded
from hetrain.public.broker.blobs import BlobStore
from hetrain.public.errors import (
    BrokerError,
    Interrupted,
    NoWorker,
    TaskFailed,
    UsageError,
    WireError,
    WorkerRefused,
)
from hetrain.public.protocol import keys
from hetrain.public.protocol.messages import (
    QUEUE,
    VERSION,
    Blob,
    Completion,
    EvaluateTask,
    Failure,
    new_token,
)
from hetrain.public.protocol.plan import Member, Plan
from hetrain.public.protocol.product import Operand, Product
from hetrain.public.protocol.registration import REGISTRY_KEY
from hetrain.transport.celery_channel import CeleryChannel
from hetrain.transport.channel import Reply
from hetrain.transport.in_process import InProcessChannel
from hetrain.transport.requests.request import Timeouts
from tasks.supervisor.server import private_directory, start_server, start_worker, stop
from tests.harness.in_flight import GUARD_S, InFlight, broker_client, has_lease, keys_of, lane
from tests.harness.one_matrix import (
    IN,
    OUT,
    Send,
    exact,
    operand,
    values,
)
from tests.harness.processes import broker_server
from tests.harness.queue_messages import body, task_message
from tests.harness.waiting import eventually


@pytest.fixture(scope="module")
def embedded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    with start_embedded(str(model), tmp_path_factory.mktemp("log") / "workers.log") as running:
        yield running


@pytest.fixture
def directory() -> Iterator[Path]:
    """Where a server's socket may lie: pytest's own paths are too long."""
    path = private_directory()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def channel(embedded: Embedded, plan: Plan) -> Iterator[CeleryChannel]:
    opened = CeleryChannel(embedded.url, health_check=embedded.failure, timeouts=Timeouts(no_worker_s=30))
    opened.prepare("tiny", "clear", plan.to_bytes(), plan.digest)
    yield opened
    opened.close()


@pytest.fixture
def client(embedded: Embedded) -> Iterator[redis.Redis]:
    with broker_client(embedded.url) as opened:
        yield opened


def fill_queue(send: Send, channel: CeleryChannel, x: np.ndarray, client: redis.Redis) -> Future[Reply]:
    """Sends to a stopped worker, which may have one task handed to it already: so two, of which one stays."""
    send(channel, x)
    pending = send(channel, x)
    assert client.llen(lane(QUEUE, channel))
    return pending


def supervisor() -> int:
    """The process id of the oldest supervisor that this process runs."""
    children = psutil.Process().children()
    return next(child.pid for child in children if "tasks.supervisor.embedded" in child.cmdline())


def worker_pids(supervisor: int) -> list[int]:
    family = psutil.Process(supervisor).children(recursive=True)
    return [child.pid for child in family if "tasks" in child.cmdline()]


def test_products_come_back_exactly_and_nothing_is_left(
    channel: CeleryChannel, matrix: np.ndarray, send: Send, client: redis.Redis
) -> None:
    x, g = operand(IN, 7), operand(OUT, 5, seed=1)
    forward, backward = send(channel, x, pieces=3), send(channel, g, "backward")
    assert (values(backward.result(), 5) == exact(matrix.T, g)).all()
    reply = forward.result()
    assert (values(reply, 7) == exact(matrix, x)).all()
    assert len(reply.parts) == 3
    assert (reply.bytes_up, reply.bytes_down) == (3 * IN * 7, 4 * OUT * 7)
    assert reply.server_s > 0
    assert all("kernel" in device for device in reply.devices)
    assert all(part.worker for part in reply.parts)
    names = client.keys("hetrain:*")
    kinds = {name.split(b":")[2] for name in names if name != REGISTRY_KEY.encode()}
    assert kinds <= {b"plan", b"fin", b"alive", b"done"}
    assert all(client.ttl(name) > 0 for name in names)
    channel.close()
    channel.close()
    assert not client.keys(f"hetrain:{channel.job}:*")


def test_many_threads_share_a_channel(
    channel: CeleryChannel, matrix: np.ndarray, send: Send, client: redis.Redis
) -> None:
    def work(seed: int) -> bool:
        x = operand(IN, 9, seed)
        return bool((values(send(channel, x, pieces=2).result(), 9) == exact(matrix, x)).all())

    expected = {b"plan", b"in", b"alive", b"lease"}
    seen, lasting = set(), set()
    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(work, seed) for seed in range(40)]

        def look() -> bool:
            for name in client.scan_iter("hetrain:*:*", count=1000):
                seen.add(name.split(b":")[2])
                if client.ttl(name) == -1:
                    lasting.add(name)
            if not all(result.done() for result in results):
                return False
            if not expected <= seen:  # a lease lasts for a moment, so more of them are needed
                results.append(pool.submit(work, len(results)))
            return expected <= seen

        eventually(look, interval_s=0)
    assert all(result.result() for result in results)
    assert not lasting


def test_workers_refuse_by_name(embedded: Embedded, plan: Plan, send: Send) -> None:
    group = plan.groups[0].model_copy(update={"digest": "0" * 64})
    other, changed = Plan(model="unknown", groups=(group,)), Plan(model="tiny", groups=(group,))
    for refused, engine, words in (
        (other, "clear", "start it with HETRAIN_MODELS="),
        (changed, "clear", "must hold the same checkpoint"),
        (plan, "rot13", "no engine"),
    ):
        channel = CeleryChannel(embedded.url)
        with pytest.raises(WorkerRefused, match=f'^worker hetrain-1@.* reports: ".*{words}.*"'):
            channel.prepare(refused.model, engine, refused.to_bytes(), refused.digest)
        with pytest.raises(UsageError):
            send(channel, operand(IN, 1)).result()
        channel.close()


def test_a_bad_request_fails_alone(
    channel: CeleryChannel, matrix: np.ndarray, plan: Plan, send: Send, in_flight: InFlight
) -> None:
    group = plan.groups[0]
    odd = Operand({}, [memoryview(b"odd")])
    bad = in_flight.start(channel, Product(group, "forward"), odd)
    elsewhere = group.model_copy(update={"name": "v"})
    nowhere = in_flight.start(channel, Product(elsewhere, "forward"), odd)
    good = send(channel, x := operand(IN, 3))
    for pending, words in ((bad, "w: the operand has 3 bytes"), (nowhere, "v: the plan has no such group")):
        with pytest.raises(TaskFailed, match=f'reports: "{words}'):
            pending.result()
    assert (values(good.result(), 3) == exact(matrix, x)).all()


def test_a_product_that_fails_in_part_leaves_nothing(
    channel: CeleryChannel, plan: Plan, embedded: Embedded, in_flight: InFlight
) -> None:
    members = (Member(module="w", tensor="w.weight", out_features=OUT + 64),)
    wider = Product(plan.groups[0].model_copy(update={"members": members}), "forward")
    x = Operand({}, [memoryview(operand(IN, 3)).cast("B")])
    pending = in_flight.start(channel, wider, x, pieces=2)
    assert [(request.task.start, request.task.stop) for request, _ in in_flight.sent[-2:]] == [
        (0, 768),
        (768, OUT + 64),
    ]
    with pytest.raises(TaskFailed, match=r"rows 768:1600 are out of range"):
        pending.result()
    assert not [name for name in keys_of(channel, embedded.url) if name.split(b":")[2] in (b"in", b"out")]


def test_a_running_copy_counts_whichever_was_sent_last(plan: Plan, send: Send, in_flight: InFlight) -> None:
    timeouts = Timeouts(run_s=8)
    with (
        broker_server() as served,
        closing(CeleryChannel(served.url, timeouts=timeouts)) as channel,
        broker_client(served.url) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        done_list = keys.done_list(channel.job)
        # This test is the only worker.
        preparing = pool.submit(channel.prepare, "tiny", "clear", plan.to_bytes(), plan.digest)
        eventually(lambda: client.llen(QUEUE))
        (asked, _), *_ = in_flight.sent
        client.rpush(done_list, Completion(request=asked.id, state="done", worker="w").to_json())
        preparing.result(GUARD_S)
        pending, *_ = [send(channel, operand(IN, 1)) for _ in range(3)]
        first, *others = [request for request, _ in in_flight.sent[1:]]
        begun = Completion(request=first.id, state="started", worker="w")
        lost = begun.model_copy(
            update={"state": "failed", "failure": Failure(error="BlobMissing", what="a blob is gone")}
        )
        lease = keys.lease(channel.job, first.id)
        client.set(lease, "w", ex=GUARD_S)
        client.rpush(done_list, begun.to_json())
        sleep(1.5)
        client.delete(lease)
        client.rpush(done_list, lost.to_json())
        eventually(lambda: in_flight.sends(first) == 2)
        client.set(lease, "w", ex=GUARD_S)
        client.rpush(done_list, begun.to_json())
        sleep(2.5)
        # It may be the first copy that has begun, so the others have not been overtaken.
        assert [in_flight.sends(request) for request in others] == [1, 1]
        client.delete(keys.alive(channel.job), lease)
        eventually(lambda: in_flight.sends(first) == 3)
        # No worker reports its start again, but its lease does.
        client.set(lease, "w", ex=GUARD_S)
        with pytest.raises(TaskFailed, match="the worker w has not finished after 8 s"):
            pending.result(GUARD_S)
        assert in_flight.sends(first) == 3


def test_a_task_that_kills_its_workers_is_given_up(
    channel: CeleryChannel, send: Send, in_flight: InFlight, client: redis.Redis
) -> None:
    worker = worker_pids(supervisor())[0]
    os.kill(worker, signal.SIGSTOP)
    pending = send(channel, operand(IN, 3))
    request, _ = in_flight.sent[-1]
    client.set(keys.tries(channel.job, request.id), keys.MAX_TRIES, ex=60)
    os.kill(worker, signal.SIGCONT)
    with pytest.raises(TaskFailed, match=f"killed its worker {keys.MAX_TRIES} times"):
        pending.result()


def test_that_an_excluded_worker_began_a_task_is_not_counted(
    channel: CeleryChannel, matrix: np.ndarray, send: Send, in_flight: InFlight, client: redis.Redis
) -> None:
    worker = worker_pids(supervisor())[0]
    os.kill(worker, signal.SIGSTOP)
    pending = send(channel, x := operand(IN, 3))
    request, _ = in_flight.sent[-1]
    begun = Completion(request=request.id, state="started", worker="liar")
    foreign = Blob(job=channel.job, kind="in", token=new_token(), nbytes=1 << 32)
    lie = begun.model_copy(update={"state": "done", "output": foreign})
    client.rpush(keys.done_list(channel.job), begun.to_json(), lie.to_json())
    eventually(lambda: in_flight.sends(request) == 2)
    client.set(keys.tries(channel.job, request.id), keys.MAX_TRIES, ex=60)
    client.rpush(keys.done_list(channel.job), begun.to_json())
    eventually(lambda: not client.exists(keys.tries(channel.job, request.id)))
    os.kill(worker, signal.SIGCONT)
    assert (values(pending.result(), 3) == exact(matrix, x)).all()


def test_a_killed_worker_is_replaced_and_its_tasks_run_again(
    channel: CeleryChannel, matrix: np.ndarray, send: Send, client: redis.Redis
) -> None:
    before = worker_pids(supervisor())
    x = operand(IN, 4096)
    pending = [send(channel, x) for _ in range(4)]
    eventually(lambda: has_lease(client, channel))
    os.kill(before[0], signal.SIGKILL)
    expected = exact(matrix, x)
    assert all((values(each.result(), 4096) == expected).all() for each in pending)
    assert set(worker_pids(supervisor())).isdisjoint(before)


def test_malformed_tasks_are_answered_where_they_name_their_job(
    channel: CeleryChannel, matrix: np.ndarray, send: Send, in_flight: InFlight, client: redis.Redis
) -> None:
    x = operand(IN, 3)
    worker = worker_pids(supervisor())[0]
    os.kill(worker, signal.SIGSTOP)
    other = fill_queue(send, channel, x, client)
    task = in_flight.sent[-1][0].task
    newer = task.model_copy(update={"version": VERSION + 1})
    client.delete(lane(QUEUE, channel))  # the proper task: others come in its place
    malformed = ("", "[]", "{", task.to_json()[:-1], '{"job": "../../etc", "request": "x"}')
    for message in (*malformed, newer.model_dump_json()):
        client.lpush(lane(QUEUE, channel), task_message(body([message]), queue=lane(QUEUE, channel)))
    os.kill(worker, signal.SIGCONT)
    with pytest.raises(TaskFailed, match=f"wire version {VERSION + 1} is not spoken here"):
        other.result()
    assert (values(send(channel, x).result(), 3) == exact(matrix, x)).all()


def test_a_lost_message_is_sent_again(
    embedded: Embedded, plan: Plan, matrix: np.ndarray, send: Send, client: redis.Redis
) -> None:
    channel = CeleryChannel(embedded.url, health_check=embedded.failure, timeouts=Timeouts(no_worker_s=6))
    channel.prepare("tiny", "clear", plan.to_bytes(), plan.digest)
    worker = worker_pids(supervisor())[0]
    os.kill(worker, signal.SIGSTOP)
    pending = fill_queue(send, channel, x := operand(IN, 3), client)
    assert client.delete(lane(QUEUE, channel))
    os.kill(worker, signal.SIGCONT)
    assert (values(pending.result(), 3) == exact(matrix, x)).all()
    channel.close()


def test_a_lost_blob_is_uploaded_again(
    channel: CeleryChannel,
    matrix: np.ndarray,
    embedded: Embedded,
    send: Send,
    in_flight: InFlight,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost: list[Blob] = []
    take = BlobStore.take

    def take_what_is_left(store: BlobStore, blob: Blob, *arguments: Any, **options: Any) -> memoryview:
        if not lost:
            store.delete([blob])
            lost.append(blob)
        return take(store, blob, *arguments, **options)

    worker = worker_pids(supervisor())[0]
    os.kill(worker, signal.SIGSTOP)
    pending = send(channel, x := operand(IN, 3), pieces=2)
    with closing(BlobStore(embedded.url)) as store:
        store.delete([in_flight.sent[-1][0].task.input])
    os.kill(worker, signal.SIGCONT)
    assert (values(pending.result(), 3) == exact(matrix, x)).all()
    monkeypatch.setattr(BlobStore, "take", take_what_is_left)
    finished = send(channel, x)
    assert (values(finished.result(), 3) == exact(matrix, x)).all()
    assert lost == [Blob(job=channel.job, kind="out", token=lost[0].token, nbytes=4 * OUT * 3)]
    assert lost[0].token == keys.output_token(in_flight.sent[-1][0].id, finished.result().parts[0].worker)
    assert in_flight.sends(in_flight.sent[-1][0]) == 2


def test_ctrl_c_is_left_to_the_client(channel: CeleryChannel, matrix: np.ndarray, send: Send) -> None:
    os.kill(supervisor(), signal.SIGINT)
    assert (values(send(channel, x := operand(IN, 3)).result(), 3) == exact(matrix, x)).all()


def test_hostile_completions_do_no_harm(
    channel: CeleryChannel, matrix: np.ndarray, send: Send, in_flight: InFlight, client: redis.Redis
) -> None:
    worker = worker_pids(supervisor())[0]
    os.kill(worker, signal.SIGSTOP)
    replies = send(channel, x := operand(IN, 3)), send(channel, x)
    foreign = Blob(job=channel.job, kind="in", token=new_token(), nbytes=1 << 32)
    lies = [
        "",
        "{}",
        json.dumps({"version": VERSION}),
        Completion(request=new_token(), state="done", worker="w", output=foreign).to_json(),
        Completion(request=new_token(), state="failed", worker="w").to_json(),
        Completion(request=in_flight.sent[-1][0].id, state="done", worker="w", output=foreign).to_json(),
    ]
    client.rpush(keys.done_list(channel.job), *lies)
    # The last one names a request of this job: it is sent again, to any worker but the one that it names.
    eventually(lambda: len(in_flight.sent) > 2, what="a request sent again")
    os.kill(worker, signal.SIGCONT)
    for reply in replies:
        assert (values(reply.result(), 3) == exact(matrix, x)).all()


def test_closing_interrupts_who_waits(embedded: Embedded, plan: Plan, send: Send) -> None:
    channel = CeleryChannel(embedded.url, health_check=embedded.failure)
    channel.prepare("tiny", "clear", plan.to_bytes(), plan.digest)
    worker = worker_pids(supervisor())[0]
    os.kill(worker, signal.SIGSTOP)
    pending = send(channel, operand(IN, 3))
    threading.Timer(0.3, channel.close).start()
    with pytest.raises(Interrupted):
        pending.result()
    os.kill(worker, signal.SIGCONT)
    with pytest.raises(Interrupted):
        send(channel, operand(IN, 3)).result()


def test_a_restarted_broker_gets_everything_again(
    model: Path, plan: Plan, matrix: np.ndarray, directory: Path, send: Send
) -> None:
    with open(directory / "log", "wb") as log:
        server, url = start_server(directory, log, password="pw")
        worker = start_worker(1, url, str(model), log)
        try:
            channel = CeleryChannel(url)
            channel.prepare("tiny", "clear", plan.to_bytes(), plan.digest)
            os.kill(worker.pid, signal.SIGSTOP)
            pending = [send(channel, operand(IN, 5, seed)) for seed in range(5)]
            server.kill()
            server.wait()
            os.kill(worker.pid, signal.SIGCONT)
            sleep(0.5)
            server, again = start_server(directory, log, password="pw")
            assert again == url
            for seed, each in enumerate(pending):
                assert (values(each.result(), 5) == exact(matrix, operand(IN, 5, seed))).all()
            channel.close()
        finally:
            stop([worker])
            stop([server])


def test_a_broker_that_stays_away_and_a_queue_without_worker_are_reported(
    plan: Plan, directory: Path
) -> None:
    with open(directory / "log", "wb") as log:
        server, url = start_server(directory, log)
        channel = CeleryChannel(url, timeouts=Timeouts(no_worker_s=1.5, outage_s=1))
        try:
            with pytest.raises(NoWorker, match="no worker answered") as caught:
                channel.prepare("tiny", "clear", plan.to_bytes(), plan.digest)
            assert "celery -A tasks worker -Q gpu" in caught.value.hint
        finally:
            stop([server])
        with pytest.raises(BrokerError) as gone:
            channel.prepare("tiny", "clear", plan.to_bytes(), plan.digest)
        assert url.split("@")[0].rsplit(":", 1)[1] not in str(gone.value)
        channel.close()


def test_the_local_channel_speaks_the_same_messages(plan: Plan) -> None:
    seen: list[EvaluateTask] = []
    (group,) = plan.groups

    def handler(task: EvaluateTask, payload: memoryview) -> list[memoryview]:
        seen.append(task)
        if task.group == "bad":
            raise WireError("no")
        return [payload[:2], payload[2:]]

    channel = InProcessChannel(handler)
    channel.prepare("tiny", "clear", b"{}", "0" * 64)
    sealed = Operand({"seed": "1"}, [memoryview(b"abc"), memoryview(b"def")])
    reply = channel.multiply(Product(group, "backward"), sealed)
    assert [bytes(part.data) for part in reply.parts] == [b"abcdef"]
    assert (seen[0].direction, seen[0].start, seen[0].stop) == ("backward", 0, IN)
    assert (reply.bytes_up, reply.bytes_down, seen[0].header) == (6, 6, {"seed": "1"})
    with pytest.raises(WireError, match="no"):
        channel.multiply(Product(group.model_copy(update={"name": "bad"}), "forward"), sealed)
