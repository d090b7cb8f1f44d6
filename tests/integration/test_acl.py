"""The access list of `docker/prepare.sh`: a fleet's clients can do their jobs, and nothing to each other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from hetrain.public.broker.connection import broker_errors, client, connection_pool, parse_broker_url
from hetrain.public.errors import BrokerError
from hetrain.public.protocol import keys
from hetrain.public.protocol.messages import QUEUE, TASK_EVALUATE
from hetrain.public.protocol.registration import REGISTRY_KEY, lane_of, lane_queue
from tasks.supervisor.server import MAX_VALUE_BYTES, private_directory, start_server
from tasks.supervisor.worker_process import spawn_worker, stop
from tests.harness.processes import HANDBOOK, HETRAIN, hetrain
from tests.harness.queue_messages import RUBBISH, task_message
from tests.harness.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = ("alice", "bob")
# Celery's commands that change something, with arguments that they take.
CHANGES: dict[str, dict[str, Any]] = {
    "shutdown": {},
    "terminate": {"task_id": "0" * 32, "signal": "KILL"},
    "revoke": {"task_id": "0" * 32},
    "revoke_by_stamped_headers": {"headers": {"a": "b"}},
    "rate_limit": {"task_name": TASK_EVALUATE, "rate_limit": "1/h"},
    "time_limit": {"task_name": TASK_EVALUATE, "hard": 1},
    "pool_restart": {},
    "pool_grow": {"n": 100},
    "pool_shrink": {"n": 1},
    "autoscale": {"max": 1, "min": 0},
    "add_consumer": {"queue": "other"},
    "cancel_consumer": {"queue": QUEUE},
    "disable_events": {},
    "heartbeat": {},
    "hello": {"from_node": "x", "revoked": {"0" * 32: 1e12}},
    "election": {"id": "1", "topic": "x"},
    "objgraph": {},
    "memdump": {},
}


@dataclass(frozen=True)
class SharedBroker:
    """A broker with the access list, and a worker: URLs by user, tenants by client, the worker, the log."""

    urls: dict[str, str]
    tenants: dict[str, str]
    worker: subprocess.Popen[bytes]
    log: Path

    def connect(self, user: str) -> redis.Redis:
        """A client of that user."""
        return client(connection_pool(self.urls[user]))


@pytest.fixture(scope="module")
def shared_broker(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedBroker]:
    secrets = tmp_path_factory.mktemp("acl") / "secrets"
    subprocess.run([ROOT / "docker" / "prepare.sh", secrets, "broker.example", *CLIENTS], check=True)
    with ExitStack() as stack:
        directory = private_directory()
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        log = stack.enter_context((directory / "log").open("wb"))
        server, root = start_server(directory, log)
        stack.callback(stop, [server])
        # The embedded server has a password of its own, so the list is loaded line by line.
        administrator = client(connection_pool(root))
        for line in (secrets / "users.acl").read_text().splitlines():
            if not line.startswith("user default "):
                administrator.execute_command("ACL", "SETUSER", *line.split(" ")[1:2], *rules(line))
        urls = {"": root}
        for user in ("worker", "operator", *CLIENTS):
            login = parse_broker_url(variables(secrets, user)["HETRAIN_BROKER_URL"]).credentials
            urls[user] = f"redis+socket://{login}@{directory}/broker.sock"
        settings = {"HETRAIN_BROKER_URL": urls["worker"], "HETRAIN_MODELS": str(tiny_llama)}
        worker = spawn_worker("hetrain-1", settings, log)
        stack.callback(stop, [worker])
        tenants = {name: variables(secrets, name)["HETRAIN_TENANT"] for name in CLIENTS}
        yield SharedBroker(urls, tenants, worker, directory / "log")


def variables(secrets: Path, user: str) -> dict[str, str]:
    """The environment that was made for a user."""
    lines = (secrets / f"{user}.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


def rules(line: str) -> list[str]:
    """What follows the user's name; what is in parentheses is one rule."""
    found: list[str] = []
    for word in line.split(" ")[2:]:
        if found and found[-1].startswith("(") and not found[-1].endswith(")"):
            found[-1] += f" {word}"
        else:
            found.append(word)
    return found


def submit(
    shared_broker: SharedBroker, user: str, model: Path, output: Path, **more: str
) -> subprocess.CompletedProcess[str]:
    place = ("--model-name-or-path", model, "--output-dir", output, "--json")
    size = ("--max-steps", "1", "--batch-tokens", "64", "--max-length", "32")
    variables = {"HETRAIN_BROKER_URL": shared_broker.urls[user], "HETRAIN_TENANT": ""} | more
    return hetrain("submit", HANDBOOK, *place, *size, environment=os.environ | variables)


def test_two_clients_share_a_fleet_and_cannot_reach_each_other(
    shared_broker: SharedBroker, tiny_llama: Path, tmp_path: Path
) -> None:
    for name in CLIENTS:
        result = submit(
            shared_broker, name, tiny_llama, tmp_path / name, HETRAIN_TENANT=shared_broker.tenants[name]
        )
        assert result.returncode == 0, result.stderr + shared_broker.log.read_text()
        assert (tmp_path / name / "adapter_model.safetensors").is_file()
    # Nothing that a job or a worker needs was refused on the way.
    assert [(entry["username"], entry["object"]) for entry in shared_broker.connect("").acl_log()] == []

    victim = f"{shared_broker.tenants['bob']}{'0' * 32}"
    theirs = [keys.alive(victim), keys.done_list(victim), keys.finished(victim, "1" * 32)]
    administrator = shared_broker.connect("")
    for key in theirs[::2]:
        administrator.set(key, "bob's", ex=60)
    administrator.rpush(theirs[1], "bob's")
    administrator.lpush(QUEUE + ".0-0of1", "a task")  # where no worker listens
    alice, own = shared_broker.connect("alice"), keys.alive(shared_broker.tenants["alice"] + "0" * 32)
    lanes = {name: lane_of(shared_broker.tenants[name]) for name in CLIENTS}
    assert len(set(lanes.values())) == len(CLIENTS)
    his_lane = lane_queue(QUEUE, tiny_llama.name, lanes["bob"])
    shared_keys = [QUEUE, his_lane, f"{QUEUE}.0-0of1", "unacked", "_kombu.binding.gpu"]
    forbidden: list[tuple[object, ...]] = [
        *[(command, key) for key in theirs for command in ("GET", "TTL", "EXISTS", "TYPE", "DUMP", "STRLEN")],
        *[(command, key) for key in theirs for command in ("DEL", "UNLINK", "LPOP", "PERSIST")],
        *[("LRANGE", key, 0, -1) for key in [*theirs, *shared_keys]],
        *[("SET", key, "x") for key in [*theirs, *shared_keys]],
        *[("RPUSH", key, "x") for key in theirs],
        *[("LPUSH", key, "x") for key in [his_lane, f"{QUEUE}.0-0of1"]],
        *[("EXPIRE", key, 1) for key in theirs],
        *[("RENAME", key, own) for key in theirs],
        *[("COPY", key, own) for key in theirs],
        *[(command, key) for key in shared_keys for command in ("LPOP", "RPOP", "DEL", "UNLINK", "LLEN")],
        ("BRPOP", QUEUE, 1),
        ("LMOVE", QUEUE, own, "RIGHT", "LEFT"),
        ("UNLINK", own, theirs[0]),
        ("SADD", "_kombu.binding.gpu", "x"),
        ("SMEMBERS", "_kombu.binding.gpu"),
        ("HGETALL", "unacked"),
        ("ZADD", REGISTRY_KEY, 1e12, "a forged card"),
        ("ZREM", REGISTRY_KEY, "x"),
        ("ZREMRANGEBYSCORE", REGISTRY_KEY, "-inf", "+inf"),
        ("DEL", REGISTRY_KEY),
        ("KEYS", "*"),
        ("KEYS", f"hetrain:{shared_broker.tenants['alice']}*"),
        ("SCAN", 0),
        ("RANDOMKEY",),
        ("DBSIZE",),
        ("EVAL", "return redis.call('get', KEYS[1])", 1, theirs[0]),
        ("EVAL", "return redis.call('get', ARGV[1])", 0, theirs[0]),
        ("SUBSCRIBE", "/0.celeryev/task.multi"),
        ("PSUBSCRIBE", "*"),
        ("PUBLISH", "/0.celery.pidbox", "{}"),
        ("PUBLISH", "__keyspace@0__:x", "x"),
        ("MONITOR",),
        ("CLIENT", "LIST"),
        ("CLIENT", "KILL", "TYPE", "normal"),
        ("CONFIG", "GET", "*"),
        ("CONFIG", "SET", "maxmemory", "1"),
        ("ACL", "LIST"),
        ("ACL", "SETUSER", "alice", "allkeys"),
        ("FLUSHALL",),
        ("FLUSHDB",),
        ("SWAPDB", 0, 1),
        ("SHUTDOWN",),
        ("SLOWLOG", "GET"),
        ("FUNCTION", "LIST"),
    ]
    for command in forbidden:
        with pytest.raises(redis.exceptions.NoPermissionError):
            alice.execute_command(*command)
    pipe = alice.pipeline(transaction=True)
    pipe.set(own, "x")
    pipe.delete(theirs[0])
    with pytest.raises(redis.exceptions.NoPermissionError):
        pipe.execute()
    assert not alice.exists(own)
    # Allowed: her own keys, the fleet's cards, and the queue's entrance are hers.
    assert alice.set(own, "x", ex=60)
    assert alice.unlink(own) == 1
    alice.zrangebyscore(REGISTRY_KEY, 0, "+inf")
    assert [administrator.get(key) for key in theirs[::2]] == [b"bob's"] * 2
    assert administrator.lrange(theirs[1], 0, -1) == [b"bob's"]
    assert administrator.llen(QUEUE + ".0-0of1") == 1


def test_workers_and_operator_have_no_more_than_they_need(shared_broker: SharedBroker) -> None:
    worker, operator = shared_broker.connect("worker"), shared_broker.connect("operator")
    job = shared_broker.tenants["bob"] + "0" * 32
    for user, commands in (
        (worker, [("KEYS", "*"), ("FLUSHALL",), ("CONFIG", "GET", "*"), ("ACL", "LIST"), ("MONITOR",)]),
        (
            operator,
            [("GET", keys.alive(job)), ("DEL", keys.alive(job)), ("LPUSH", QUEUE, "x"), ("KEYS", "*")],
        ),
        (operator, [("LRANGE", QUEUE, 0, -1), ("ZADD", REGISTRY_KEY, 1, "x"), ("LPOP", keys.done_list(job))]),
    ):
        for command in commands:
            with pytest.raises(redis.exceptions.NoPermissionError):
                user.execute_command(*command)


def test_no_message_of_a_tenant_stops_or_wedges_a_worker(
    shared_broker: SharedBroker, tiny_llama: Path, tmp_path: Path
) -> None:
    alice, administrator = shared_broker.connect("alice"), shared_broker.connect("")
    eventually(lambda: administrator.zcard(REGISTRY_KEY) == 1)
    for message in RUBBISH.values():
        alice.lpush(QUEUE, message)
    alice.lpush(QUEUE, *RUBBISH.values())
    with pytest.raises(redis.exceptions.RedisError), shared_broker.connect("alice") as another:
        another.lpush(QUEUE, bytes(MAX_VALUE_BYTES + 1))  # the broker does not take it
    result = submit(
        shared_broker, "bob", tiny_llama, tmp_path / "out", HETRAIN_TENANT=shared_broker.tenants["bob"]
    )
    assert result.returncode == 0, result.stderr + shared_broker.log.read_text()
    assert shared_broker.worker.poll() is None
    assert administrator.llen(QUEUE) == 0
    assert not administrator.exists("unacked", "unacked_index")
    assert statistics(shared_broker)["pool"]["refused-messages"] == 2 * len(RUBBISH)
    log = shared_broker.log.read_text()
    assert "dropped a message from queue gpu, which is not ours: " in log
    assert "Traceback" not in log
    assert all(line.isprintable() and len(line) < 1000 for line in log.splitlines())


def test_nobody_can_change_a_worker_by_remote_control(shared_broker: SharedBroker) -> None:
    """Neither the operator nor another worker: whatever is published, the worker goes on."""
    before = statistics(shared_broker)["pool"]["refused-messages"]
    for user in ("operator", "worker"):
        app = celery_app(shared_broker.urls[user])
        for command, arguments in CHANGES.items():
            assert app.control.broadcast(command, arguments=arguments, reply=True, timeout=0.1) == []
        for rubbish in (*RUBBISH.values(), task_message(queue="celery.pidbox")):
            shared_broker.connect(user).publish("/0.celery.pidbox", rubbish)
    after = statistics(shared_broker)
    assert after["pool"]["refused-messages"] - before == 2 * (len(CHANGES) + len(RUBBISH) + 1)
    assert after["pool"]["max-concurrency"] == 1
    assert shared_broker.worker.poll() is None


def celery_app(url: str) -> Celery:
    app = Celery(broker=parse_broker_url(url).for_celery(), set_as_current=False)
    app.conf.broker_transport_options = {"ack_emulation": False}
    return app


def statistics(shared_broker: SharedBroker) -> dict[str, Any]:
    """The only worker's."""
    app = celery_app(shared_broker.urls["operator"])
    (found,) = eventually(lambda: app.control.inspect(timeout=2).stats()).values()
    return dict(found)


def test_the_operator_can_ask_the_workers(shared_broker: SharedBroker) -> None:
    ping = [sys.executable, "-m", "celery", "-A", "tasks", "inspect", "ping", "--json"]
    # The worker image's health check does what the last one does.
    for user, command in (("operator", [*HETRAIN, "doctor"]), ("operator", ping), ("worker", ping)):
        environment = os.environ | {"HETRAIN_BROKER_URL": shared_broker.urls[user]}
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert "hetrain-1@" in result.stdout


def test_a_client_without_its_tenant_gets_an_error(
    shared_broker: SharedBroker, tiny_llama: Path, tmp_path: Path
) -> None:
    result = submit(shared_broker, "alice", tiny_llama, tmp_path)
    assert result.returncode == BrokerError.exit_code
    assert "HETRAIN_TENANT" in result.stderr
    with pytest.raises(BrokerError, match="access list"), broker_errors(shared_broker.urls["alice"]):
        shared_broker.connect("alice").get(keys.alive(shared_broker.tenants["bob"] + "0" * 32))
