"""Lanes: what a job with few tasks gets of a worker beside one with many, and queues without workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from hetrain.public.protocol import keys
from hetrain.public.protocol.messages import QUEUE, Completion, new_token, parse
from hetrain.public.protocol.registration import (
    LANES,
    MAX_LANE_MODELS,
    REGISTRY_KEY,
    WorkerRegistration,
    lane_of,
    lane_queues,
)
from tasks.queue_expiry import UNKNOWN_TTL_S
from tests.harness.checkpoints import load_matrices, operand, plan_of, save_matrices
from tests.harness.processes import BrokerServer, broker_server
from tests.harness.raw_client import RawClient, registrations, workers
from tests.harness.waiting import eventually

MANY, FEW = 40, 32
TOKENS = 1 << 6
LARGE = 1 << 16
CARD = WorkerRegistration(
    worker="a@host", device="cpu", queue=QUEUE, lanes=True, models=("tiny", "other/model"), concurrency=1
)


@pytest.fixture(scope="module")
def broker() -> Iterator[BrokerServer]:
    with broker_server() as server:
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_matrices(directory)
    return directory


def test_a_job_with_many_large_tasks_does_not_starve_one_with_small_ones(
    broker: BrokerServer, model: Path
) -> None:
    plan, redis_client = plan_of(load_matrices(model)), broker.connect()
    with ExitStack() as stack:
        stack.callback(redis_client.close)
        (worker,) = stack.enter_context(workers(broker, model))
        eventually(lambda: registrations(redis_client))
        ((registration, _),) = registrations(redis_client).values()
        assert registration.lanes
        greedy, modest = (RawClient(broker.url, plan, job=digit + new_token()[1:]) for digit in "3a")
        for each in (greedy, modest):
            stack.callback(each.close)
            assert each.answer(each.prepare(registration.queue_of("tiny", each.job))).state == "done"
        large, small = operand(tokens=LARGE), operand(tokens=TOKENS)
        # Whatever preparation took, both lanes stand where this one began.
        assert modest.answer(modest.evaluate(registration.queue_of("tiny", modest.job), 0, small))
        os.kill(worker.pid, signal.SIGSTOP)
        many = [greedy.evaluate(registration.queue_of("tiny", greedy.job), 0, large) for _ in range(MANY)]
        few = [modest.evaluate(registration.queue_of("tiny", modest.job), 0, small) for _ in range(FEW)]
        os.kill(worker.pid, signal.SIGCONT)
        assert all(modest.answer(request).state == "done" for request in few)
        reports = redis_client.lrange(keys.done_list(greedy.job), 0, -1)
        ended = [each for each in reports if parse(Completion, each, where="done-list").state == "done"]
        # One of them for each of the few, and those that ended before this was counted.
        assert len(ended) < MANY // 2
        assert all(greedy.answer(request).state == "done" for request in many)


def test_queues_without_workers_expire_and_others_stay(broker: BrokerServer, model: Path) -> None:
    with closing(broker.connect()) as redis_client:
        elsewhere = CARD.model_copy(update={"queue": f"{QUEUE}.1-1of3", "shards": "1/3"})
        unknown, served = f"{QUEUE}.7-7of9", elsewhere.queue_of("tiny", new_token())
        redis_client.lpush(unknown, "x")
        redis_client.lpush(served, "x")
        redis_client.expire(served, UNKNOWN_TTL_S)
        redis_client.set(f"{QUEUE}.text", "no queue")
        redis_client.zadd(REGISTRY_KEY, {elsewhere.model_dump_json(): redis_client.time()[0] + 60})
        with workers(broker, model):
            eventually(lambda: 0 < redis_client.ttl(unknown) <= UNKNOWN_TTL_S)
            eventually(lambda: redis_client.ttl(served) == -1)
        assert redis_client.ttl(f"{QUEUE}.text") == -1
        redis_client.delete(unknown, served, f"{QUEUE}.text")


def test_a_lane_is_the_first_digit_of_the_job_and_of_its_tenant() -> None:
    assert [lane_of(f"{digit}{'0' * 31}") for digit in "0123456789abcdef"] == list(range(LANES))
    queue = CARD.queue_of("tiny", "c" + "0" * 47)
    assert queue.startswith(f"{QUEUE}.")
    assert queue.endswith(".c")
    assert len(set(CARD.queues)) == 1 + 2 * LANES
    assert queue in CARD.queues
    assert CARD.model_copy(update={"lanes": False}).queue_of("tiny", "c" + "0" * 47) == QUEUE
    assert lane_queues(QUEUE, map(str, range(MAX_LANE_MODELS + 1))) == ()
