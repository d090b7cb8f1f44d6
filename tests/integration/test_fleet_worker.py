"""Workers: their registrations, their shards, and many of them under one supervisor."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import redis
import torch

from hetrain.public.protocol.messages import (
    QUEUE,
)
from hetrain.public.protocol.plan import Plan
from hetrain.public.protocol.registration import REGISTRY_KEY, ShardRange
from tasks.supervisor.server import DEFAULT_MAXMEMORY, stop
from tasks.supervisor.worker_process import spawn_worker
from tests.harness.checkpoints import GROUPS, load_matrices, operand, plan_of, product, save_matrices
from tests.harness.processes import HETRAIN, BrokerServer, broker_server, hetrain
from tests.harness.raw_client import RawClient, registrations, workers
from tests.harness.waiting import eventually


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_matrices(directory)
    return directory


@pytest.fixture(scope="module")
def matrices(model: Path) -> list[torch.Tensor]:
    return load_matrices(model)


@pytest.fixture(scope="module")
def plan(matrices: list[torch.Tensor]) -> Plan:
    return plan_of(matrices)


@pytest.fixture(scope="module")
def broker() -> Iterator[BrokerServer]:
    with broker_server() as server:
        yield server


@pytest.fixture
def redis_client(broker: BrokerServer) -> Iterator[redis.Redis]:
    """A client of a broker without registered workers, even where the last test left some."""
    client = broker.connect()
    client.delete(REGISTRY_KEY)
    yield client
    client.close()


@pytest.fixture
def raw_client(broker: BrokerServer, plan: Plan) -> Iterator[RawClient]:
    opened = RawClient(broker.url, plan)
    yield opened
    opened.close()


def test_a_registration_is_renewed_expires_after_a_crash_and_is_removed_by_a_worker_that_ends(
    broker: BrokerServer, redis_client: redis.Redis, model: Path
) -> None:
    with workers(broker, model, 2) as (crashing, leaving):
        eventually(lambda: len(registrations(redis_client)) == 2)
        first = registrations(redis_client)
        for registration, _ in first.values():
            assert re.fullmatch(r"w[01]@.+", registration.worker)
            assert (
                registration.queue,
                registration.models,
                registration.shards,
                registration.concurrency,
            ) == (QUEUE, ("tiny",), None, 1)
            assert "kernel" in registration.device
        eventually(lambda: all(registrations(redis_client)[name][1] > first[name][1] for name in first))
        crashing.kill()
        crashing.wait()
        assert len(registrations(redis_client)) == 2
        eventually(lambda: redis_client.zcard(REGISTRY_KEY) == 1)  # the other worker has removed it
        (name,) = registrations(redis_client)
        assert name.startswith("w1@")
        leaving.terminate()
        assert leaving.wait(30) == 0
        assert not redis_client.exists(REGISTRY_KEY)


def test_a_broken_registry_does_not_end_a_worker(
    broker: BrokerServer,
    redis_client: redis.Redis,
    raw_client: RawClient,
    model: Path,
    matrices: list[torch.Tensor],
) -> None:
    before = broker.directory.joinpath("log").read_text()

    def complaints() -> int:
        return (
            broker.directory.joinpath("log")
            .read_text()[len(before) :]
            .count("cannot see this worker's registration")
        )

    with workers(broker, model) as (worker,):
        eventually(lambda: registrations(redis_client))
        redis_client.delete(REGISTRY_KEY)
        redis_client.set(REGISTRY_KEY, "no sorted set")
        eventually(lambda: complaints() == 1)
        assert (
            raw_client.result(raw_client.evaluate(QUEUE, 1, operand())) == product(matrices[1], operand())
        ).all()
        redis_client.delete(REGISTRY_KEY)
        eventually(lambda: registrations(redis_client))
        redis_client.config_set("maxmemory", 1)
        try:
            eventually(lambda: complaints() == 2)
            eventually(lambda: not registrations(redis_client))
        finally:
            redis_client.config_set("maxmemory", DEFAULT_MAXMEMORY)
        eventually(lambda: registrations(redis_client))
        assert complaints() == 2
        assert worker.poll() is None


def test_a_sharded_worker_takes_from_its_own_queue_loads_its_own_groups_and_refuses_others(
    broker: BrokerServer, redis_client: redis.Redis, model: Path, plan: Plan, matrices: list[torch.Tensor]
) -> None:
    shards = ShardRange.parse("1/3")
    # To load a matrix with another digest would be refused.
    own = [index for index in range(GROUPS) if shards.has(index, GROUPS)]
    groups = [
        group if index in own else group.model_copy(update={"digest": "0" * 64})
        for index, group in enumerate(plan.groups)
    ]
    with ExitStack() as stack:
        raw_client = RawClient(broker.url, plan.model_copy(update={"groups": tuple(groups)}))
        stack.callback(raw_client.close)
        stack.callback(redis_client.delete, QUEUE)
        stack.enter_context(workers(broker, model, HETRAIN_SHARDS=" 1/3 "))
        eventually(lambda: registrations(redis_client))
        ((registration, _),) = registrations(redis_client).values()
        assert (
            (registration.queue, registration.shards)
            == ("gpu.1-1of3", "1-1/3")
            == (shards.queue, str(shards))
        )
        raw_client.evaluate(QUEUE, own[0], operand())
        assert raw_client.answer(raw_client.prepare(registration.queue)).state == "done"
        for index in own:
            assert registration.serves("tiny", index, GROUPS)
            x = operand(index)
            assert (
                raw_client.result(raw_client.evaluate(registration.queue, index, x))
                == product(matrices[index], x)
            ).all()
        other = raw_client.answer(raw_client.evaluate(registration.queue, 0, operand()))
        assert other.failure is not None
        assert other.failure.error == "WorkerRefused"
        assert "shards 1-1/3" in other.failure.what
        assert registration.queue in other.failure.hint
        assert redis_client.llen(QUEUE) == 1  # no worker has taken it
        (report,) = raw_client.about()
        assert (report["shards"], report["queues"]) == ("1-1/3", [registration.queue])


@pytest.mark.parametrize("text", ["8-7/32", "all"])
def test_a_worker_with_invalid_shards_prints_why_and_ends(
    broker: BrokerServer, model: Path, text: str, tmp_path: Path
) -> None:
    with (tmp_path / "log").open("wb") as log:
        settings = {"HETRAIN_BROKER_URL": broker.url, "HETRAIN_MODELS": str(model), "HETRAIN_SHARDS": text}
        worker = spawn_worker("w0", settings, log)
        try:
            assert worker.wait(60) == 78
        finally:
            stop([worker])
    assert "hetrain worker cannot start: UsageError: HETRAIN_SHARDS: " in (tmp_path / "log").read_text()


def start_fleet(broker: BrokerServer, model: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [*HETRAIN, "worker", "--models", str(model), *options]
    return subprocess.Popen(
        command,
        env=os.environ | {"HETRAIN_BROKER_URL": broker.url, "HETRAIN_DEVICE": "cpu"},
        stdout=broker.log,
        stderr=broker.log,
        # A shell has its background jobs ignore Ctrl-C; these tests may be one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def gone(processes: Sequence[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=20)[1]


def test_one_command_runs_many_workers(
    broker: BrokerServer,
    redis_client: redis.Redis,
    raw_client: RawClient,
    model: Path,
    matrices: list[torch.Tensor],
) -> None:
    fleet = start_fleet(broker, model, "--workers", "2", "--concurrency", "3", "--weights-bytes", "20GB")
    try:
        eventually(lambda: len(registrations(redis_client)) == 2)
        assert {registration.concurrency for registration, _ in registrations(redis_client).values()} == {3}
        family = psutil.Process(fleet.pid).children(recursive=True)
        assert len(family) == 2
        password = broker.url.rsplit("@", 1)[0].rsplit(":", 1)[1]
        assert all(password not in " ".join(each.cmdline()) for each in (psutil.Process(fleet.pid), *family))
        assert served_by(raw_client, matrices, 2) == set(registrations(redis_client))

        family[0].kill()
        eventually(lambda: len(family_of(fleet) - set(family)) == 1)
        names = set(registrations(redis_client))
        eventually(lambda: len(registrations(redis_client)) == 2)
        assert set(registrations(redis_client)) == names  # it goes by the name of the one before
        assert served_by(raw_client, matrices, 2) == names

        family = list(family_of(fleet))
        x = operand(tokens=1 << 16)
        request = raw_client.evaluate(QUEUE, 3, x)
        raw_client.await_start(request)
        fleet.send_signal(signal.SIGTERM)
        assert fleet.wait(60) == 0
        assert (raw_client.result(request) == product(matrices[3], x)).all()  # it was finished first
        assert gone(family)
        assert not redis_client.exists(REGISTRY_KEY)
    finally:
        fleet.kill()
        fleet.wait()


def family_of(fleet: subprocess.Popen[bytes]) -> set[psutil.Process]:
    return set(psutil.Process(fleet.pid).children(recursive=True))


def served_by(raw_client: RawClient, matrices: list[torch.Tensor], count: int) -> set[str]:
    """The names of the workers that answer, as soon as so many have."""
    names: set[str] = set()

    def all_served() -> bool:
        requests = [raw_client.evaluate(QUEUE, index, operand()) for index in range(GROUPS)]
        names.update(raw_client.answer(request).worker for request in requests)
        return len(names) >= count

    eventually(all_served)
    return names


@pytest.mark.parametrize("how", ["interrupted twice", "killed"])
def test_a_worker_that_hangs_keeps_no_fleet_alive(
    broker: BrokerServer, redis_client: redis.Redis, model: Path, how: str
) -> None:
    fleet = start_fleet(broker, model)
    try:
        eventually(lambda: registrations(redis_client))
        (worker,) = family_of(fleet)
        worker.suspend()
        if how == "killed":
            fleet.kill()
        else:
            fleet.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                fleet.wait(1)  # what it is running may take long
            fleet.send_signal(signal.SIGINT)
            assert fleet.wait(30) == 0
        assert gone([worker])
    finally:
        fleet.kill()
        fleet.wait()


@pytest.mark.parametrize(
    ("options", "setting", "status", "words"),
    [
        (("--shards", "9"), {}, 2, "'9' is no range of shards"),
        (("--broker-url", "http://x"), {}, 2, "unknown scheme"),
        (("--workers", "2"), {"HETRAIN_DEVICE": "nowhere"}, 78, "device 'nowhere' cannot be used"),
        (("--weights-bytes", "much"), {"HETRAIN_DEVICE": "cpu"}, 2, "no number of bytes"),
    ],
)
def test_a_supervisor_that_cannot_work_prints_why_and_ends(
    broker: BrokerServer, options: tuple[str, ...], setting: dict[str, str], status: int, words: str
) -> None:
    environment = os.environ | {"HETRAIN_BROKER_URL": broker.url} | setting
    ended = hetrain("worker", *options, environment=environment)
    assert ended.returncode == status, ended.stderr
    assert words in " ".join(ended.stderr.split())


def test_a_supervisor_refuses_settings_that_make_no_sense() -> None:
    command = [sys.executable, "-m", "tasks.supervisor.multi_gpu"]
    settings = {"HETRAIN_WEIGHTS_BYTES": "much", "HETRAIN_DEVICE": "cpu"}
    ended = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 78, ended.stderr
    assert "HETRAIN_WEIGHTS_BYTES: 'much' is no number of bytes" in ended.stderr


@pytest.mark.parametrize("pool", ["processes", "solo"])  # Celery itself replaces prefork by threads
def test_a_worker_refuses_another_pool_than_threads(broker: BrokerServer, model: Path, pool: str) -> None:
    command = [sys.executable, "-m", "tasks", "worker", "-Q", QUEUE, "-P", pool]
    settings = {"HETRAIN_BROKER_URL": broker.url, "HETRAIN_MODELS": str(model)}
    ended = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 78, ended.stderr
    assert "hetrain worker cannot start: UsageError: -P: this worker's pool is not 'threads'" in ended.stderr
    assert "start it without -P" in ended.stderr
