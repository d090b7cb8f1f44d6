"""Workers of a fleet: their cards, their shards, their memory, and many of them under one supervisor."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import psutil
import pytest
import redis
import torch
from celery import Celery
from safetensors.torch import load_file, save_file

from hetrain.public.broker.blobs import BlobStore
from hetrain.public.broker.connection import parse_broker_url
from hetrain.public.errors import UsageError, WorkerRefused
from hetrain.public.model.quantization import quantize
from hetrain.public.protocol import keys
from hetrain.public.protocol.messages import (
    CONTROL_REPORT,
    QUEUE,
    TASK_EVALUATE,
    TASK_PREPARE,
    Completion,
    EvaluateTask,
    PrepareTask,
    new_token,
    parse,
)
from hetrain.public.protocol.plan import Member, Plan, group_of
from hetrain.public.protocol.registration import REGISTRY_KEY, ShardRange, WorkerRegistration
from tasks.supervisor.multi_gpu import plan_workers
from tasks.supervisor.server import DEFAULT_MAXMEMORY, stop
from tasks.supervisor.worker_process import spawn_worker
from tests.harness.processes import HETRAIN, Serving, serving
from worker_gpu.device import Compute
from worker_gpu.kernels import KERNELS
from worker_gpu.lru import LruCache
from worker_gpu.service import Service
from worker_gpu.weights.store import WeightStore, weights_limit

OUT, IN, GROUPS = 40, 24, 6
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with one matrix for each group."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    generator = torch.Generator().manual_seed(1)
    names = [f"g{index}.weight" for index in range(GROUPS)]
    save_file({n: torch.randn(OUT, IN, generator=generator) for n in names}, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def matrices(model: Path) -> list[torch.Tensor]:
    """Their int8 forms."""
    tensors = load_file(model / "model.safetensors")
    return [quantize(tensors[f"g{index}.weight"]).values for index in range(GROUPS)]


@pytest.fixture(scope="module")
def plan(matrices: list[torch.Tensor]) -> Plan:
    groups = []
    for index, matrix in enumerate(matrices):
        members = (Member(module=f"g{index}", tensor=f"g{index}.weight", out_features=OUT),)
        groups.append(group_of(members, matrix))
    return Plan(model="tiny", groups=tuple(groups))


@pytest.fixture(scope="module")
def broker() -> Iterator[Serving]:
    with serving() as running:
        yield running


@pytest.fixture
def redis_client(broker: Serving) -> Iterator[redis.Redis]:
    """A client of a broker whose fleet is empty, whatever became of the last test's."""
    client = redis.Redis.from_url(parse_broker_url(broker.url).for_redis())
    client.delete(REGISTRY_KEY)
    yield client
    client.close()


class Asker:
    """A bare client, which puts tasks into any queue it likes."""

    def __init__(self, url: str, plan: Plan) -> None:
        self._app = Celery(broker=parse_broker_url(url).for_celery(), set_as_current=False)
        self._store = BlobStore(url)
        self._job, self._plan = new_token(), plan
        self._started: set[str] = set()
        self._ended: dict[str, Completion] = {}
        self._store.client.set(keys.alive(self._job), keys.ALIVE_VALUE, ex=600)
        self._blob = self._store.put(self._job, "plan", plan.digest, [memoryview(plan.to_bytes())])

    def prepare(self, queue: str) -> str:
        """Returns the request's name."""
        return self._send(TASK_PREPARE, PrepareTask, queue)

    def evaluate(self, queue: str, group: int, x: np.ndarray) -> str:
        """Returns the request's name."""
        operand = self._store.put(self._job, "in", new_token(), [memoryview(x).cast("B")])
        rows = {"start": 0, "stop": OUT, "direction": "forward", "header": {}, "input": operand}
        return self._send(TASK_EVALUATE, EvaluateTask, queue, group=f"g{group}", **rows)

    def _send(self, name: str, kind: type, queue: str, **fields: object) -> str:
        job = {"job": self._job, "plan": self._blob, "plan_digest": self._plan.digest}
        task = kind(request=new_token(), model="tiny", engine="clear", **job, **fields)
        self._app.send_task(name, args=[task.to_json()], queue=queue, ignore_result=True)
        return str(task.request)

    def answer(self, request: str) -> Completion:
        """How the request ended."""
        while request not in self._ended:
            self._listen()
        return self._ended[request]

    def await_start(self, request: str) -> None:
        """Returns when a worker has begun the request."""
        while request not in self._started:
            self._listen()

    def _listen(self) -> None:
        popped = self._store.client.blpop([keys.done_list(self._job)], timeout=25)
        assert popped is not None, "nobody answers"
        completion = parse(Completion, popped[1], where="done-list")
        if completion.state == "started":
            self._started.add(completion.request)
        else:
            self._ended[completion.request] = completion

    def result(self, request: str) -> np.ndarray:
        """The product of a request that succeeds, [OUT, T]."""
        completion = self.answer(request)
        assert completion.output is not None, completion
        return np.frombuffer(self._store.get(completion.output), np.int32).reshape(OUT, -1)

    def about(self) -> list[dict[str, object]]:
        """What workers say of themselves."""
        replies = self._app.control.broadcast(CONTROL_REPORT, reply=True, timeout=5, limit=1)
        return [report for reply in replies for report in reply.values()]

    def close(self) -> None:
        self._store.close()
        self._app.close()


@pytest.fixture
def asker(broker: Serving, plan: Plan) -> Iterator[Asker]:
    opened = Asker(broker.url, plan)
    yield opened
    opened.close()


def operand(seed: int = 0, tokens: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(-(2**31), 2**31, (IN, tokens), dtype=np.int32)


def product(matrix: torch.Tensor, x: np.ndarray) -> np.ndarray:
    """W·x modulo 2^32; int64 wraps modulo 2^64."""
    return (matrix.numpy().astype(np.int64) @ x.astype(np.int64)).astype(np.int32)


def eventually(condition: Callable[[], object], seconds: float = 60) -> bool:
    end = monotonic() + seconds
    while not condition():
        if monotonic() > end:
            return False
        sleep(0.05)
    return True


def cards(client: redis.Redis) -> dict[str, tuple[WorkerRegistration, float]]:
    """Worker -> its card and the moment at which it lapses, of all cards that have not lapsed."""
    seconds, microseconds = client.time()
    found = client.zrangebyscore(REGISTRY_KEY, seconds + microseconds / 1e6, "+inf", withscores=True)
    parsed = [(parse(WorkerRegistration, member, where=REGISTRY_KEY), score) for member, score in found]
    return {card.worker: (card, score) for card, score in parsed}


@contextmanager
def workers(
    broker: Serving, model: Path, count: int = 1, **settings: str
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Workers ``w0@…``, ``w1@…`` without a supervisor."""
    settings = {
        "HETRAIN_BROKER_URL": broker.url,
        "HETRAIN_MODELS": str(model),
        "OMP_NUM_THREADS": "1",
    } | settings
    running = [spawn_worker(f"w{index}", settings, broker.log) for index in range(count)]
    try:
        yield running
    finally:
        stop(running)


def test_a_card_is_renewed_lapses_with_a_crash_and_goes_at_once_with_a_farewell(
    broker: Serving, redis_client: redis.Redis, model: Path
) -> None:
    with workers(broker, model, 2) as (crashing, leaving):
        assert eventually(lambda: len(cards(redis_client)) == 2)
        first = cards(redis_client)
        for card, _ in first.values():
            assert re.fullmatch(r"w[01]@.+", card.worker)
            assert (card.queue, card.models, card.shards, card.concurrency) == (QUEUE, ("tiny",), None, 1)
            assert "kernel" in card.device
        assert eventually(lambda: all(cards(redis_client)[name][1] > first[name][1] for name in first))
        crashing.kill()
        crashing.wait()
        assert len(cards(redis_client)) == 2
        assert eventually(lambda: redis_client.zcard(REGISTRY_KEY) == 1)  # the survivor swept it away
        (name,) = cards(redis_client)
        assert name.startswith("w1@")
        leaving.terminate()
        assert leaving.wait(30) == 0
        assert not redis_client.exists(REGISTRY_KEY)


def test_no_trouble_with_the_fleet_key_ends_a_worker(
    broker: Serving, redis_client: redis.Redis, asker: Asker, model: Path, matrices: list[torch.Tensor]
) -> None:
    before = broker.directory.joinpath("log").read_text()

    def complaints() -> int:
        return (
            broker.directory.joinpath("log")
            .read_text()[len(before) :]
            .count("cannot see this worker's registration")
        )

    with workers(broker, model) as (worker,):
        assert eventually(lambda: cards(redis_client))
        redis_client.delete(REGISTRY_KEY)
        redis_client.set(REGISTRY_KEY, "no sorted set")
        assert eventually(lambda: complaints() == 1)
        assert (asker.result(asker.evaluate(QUEUE, 1, operand())) == product(matrices[1], operand())).all()
        redis_client.delete(REGISTRY_KEY)
        assert eventually(lambda: cards(redis_client))
        redis_client.config_set("maxmemory", 1)
        try:
            assert eventually(lambda: complaints() == 2)
            assert eventually(lambda: not cards(redis_client))
        finally:
            redis_client.config_set("maxmemory", DEFAULT_MAXMEMORY)
        assert eventually(lambda: cards(redis_client))
        assert complaints() == 2
        assert worker.poll() is None


def test_a_sharded_worker_takes_from_its_own_queue_loads_its_own_groups_and_refuses_others(
    broker: Serving, redis_client: redis.Redis, model: Path, plan: Plan, matrices: list[torch.Tensor]
) -> None:
    shards = ShardRange.parse("1/3")
    # To load a matrix with another digest would be refused.
    own = [index for index in range(GROUPS) if shards.has(index, GROUPS)]
    groups = [
        group if index in own else group.model_copy(update={"digest": "0" * 64})
        for index, group in enumerate(plan.groups)
    ]
    with ExitStack() as stack:
        asker = Asker(broker.url, plan.model_copy(update={"groups": tuple(groups)}))
        stack.callback(asker.close)
        stack.callback(redis_client.delete, QUEUE)
        stack.enter_context(workers(broker, model, HETRAIN_SHARDS=" 1/3 "))
        assert eventually(lambda: cards(redis_client))
        ((card, _),) = cards(redis_client).values()
        assert (card.queue, card.shards) == ("gpu.1-1of3", "1-1/3") == (shards.queue, str(shards))
        asker.evaluate(QUEUE, own[0], operand())
        assert asker.answer(asker.prepare(card.queue)).state == "done"
        for index in own:
            assert card.serves("tiny", index, GROUPS)
            x = operand(index)
            assert (asker.result(asker.evaluate(card.queue, index, x)) == product(matrices[index], x)).all()
        other = asker.answer(asker.evaluate(card.queue, 0, operand()))
        assert other.failure is not None
        assert other.failure.error == "WorkerRefused"
        assert "shards 1-1/3" in other.failure.what
        assert card.queue in other.failure.hint
        assert redis_client.llen(QUEUE) == 1  # nobody has touched it
        (report,) = asker.about()
        assert (report["shards"], report["queues"]) == ("1-1/3", [card.queue])


@pytest.mark.parametrize("text", ["8-7/32", "all"])
def test_shards_that_make_no_sense_end_a_worker_with_words(
    broker: Serving, model: Path, text: str, tmp_path: Path
) -> None:
    with (tmp_path / "log").open("wb") as log:
        settings = {"HETRAIN_BROKER_URL": broker.url, "HETRAIN_MODELS": str(model), "HETRAIN_SHARDS": text}
        worker = spawn_worker("w0", settings, log)
        try:
            assert worker.wait(60) == 78
        finally:
            stop([worker])
    assert "hetrain worker cannot start: UsageError: HETRAIN_SHARDS: " in (tmp_path / "log").read_text()


def evaluate(service: Service, plan: Plan, group: int, x: np.ndarray) -> np.ndarray:
    blob = {"job": new_token(), "token": new_token(), "nbytes": x.nbytes}
    task = EvaluateTask.model_validate(
        {
            "request": new_token(), "job": new_token(), "model": "tiny", "engine": "clear",
            "plan": blob | {"kind": "plan"}, "plan_digest": plan.digest, "group": f"g{group}",
            "direction": "forward", "start": 0, "stop": OUT, "header": {}, "input": blob | {"kind": "in"},
        }
    )  # fmt: skip
    (part,) = service.evaluate(task, plan.to_bytes, memoryview(bytearray(x.tobytes())))
    return np.frombuffer(part, np.int32).reshape(OUT, -1)


def test_weights_stay_within_their_budget_and_products_exact(
    model: Path, plan: Plan, matrices: list[torch.Tensor], one_thread: None
) -> None:
    limit = 2 * OUT * IN + 1
    weights = WeightStore(CPU, {"tiny": str(model)}, limit)
    service = Service(Compute(CPU, "int8", KERNELS["int8"]), weights)
    held = weights.matrix("tiny", plan.groups[0])
    weights.load_all(plan)
    assert weights.nbytes == 2 * OUT * IN
    assert weights.matrix("tiny", plan.groups[0]) is held  # nothing had to go for the rest of the plan

    def work(seed: int) -> bool:
        group, x = seed % GROUPS, operand(seed)
        good = bool((evaluate(service, plan, group, x) == product(matrices[group], x)).all())
        return good and weights.nbytes <= limit

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(120)))
    assert weights.nbytes == 2 * OUT * IN
    # The last one used is there, and the least recently used makes room.
    last = weights.matrix("tiny", plan.groups[3])
    weights.matrix("tiny", plan.groups[4])
    assert weights.matrix("tiny", plan.groups[3]) is last
    weights.matrix("tiny", plan.groups[5])
    weights.matrix("tiny", plan.groups[4])
    assert weights.matrix("tiny", plan.groups[3]) is not last
    # A budget below a single matrix is slow, and nothing else.
    small = Service(Compute(CPU, "int8", KERNELS["int8"]), WeightStore(CPU, {"tiny": str(model)}, 1))
    assert (evaluate(small, plan, 2, operand()) == product(matrices[2], operand())).all()


def test_other_weights_are_refused_where_there_is_no_room_either(model: Path, plan: Plan) -> None:
    weights = WeightStore(CPU, {"tiny": str(model)}, OUT * IN)
    weights.load_all(plan)
    changed = plan.groups[-1].model_copy(update={"digest": "0" * 64})
    with pytest.raises(WorkerRefused, match="g5: this worker's weights of tiny differ"):
        weights.load_all(plan.model_copy(update={"groups": (*plan.groups[:-1], changed)}))


def test_what_is_being_made_keeps_nobody_else_waiting_and_is_made_once() -> None:
    cache: LruCache[str] = LruCache()
    made: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def slowly() -> str:
        begun.set()
        assert go_on.wait(30)
        made.append("slow")
        return "slow"

    with ThreadPoolExecutor(3) as pool:
        slow = [pool.submit(cache.get, "slow", slowly) for _ in range(3)]
        assert begun.wait(30)
        assert cache.get("quick", lambda: "quick") == "quick"
        go_on.set()
        assert [each.result(30) for each in slow] == ["slow"] * 3
    assert made == ["slow"]
    with pytest.raises(ZeroDivisionError):
        cache.get("failing", lambda: str(1 / 0))
    assert cache.get("failing", lambda: "again") == "again"


def test_a_budget_is_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HETRAIN_WEIGHTS_BYTES", raising=False)
    assert weights_limit(CPU) is None
    for text, size in (("20GB", 20 * 10**9), ("1.5 GiB", 3 << 29), ("4096", 4096)):
        monkeypatch.setenv("HETRAIN_WEIGHTS_BYTES", text)
        assert weights_limit(CPU) == size
    for text in ("0", "-1", "much", "nan", "inf", "1e400"):
        monkeypatch.setenv("HETRAIN_WEIGHTS_BYTES", text)
        with pytest.raises(UsageError, match="no number of bytes"):
            weights_limit(CPU)


def test_each_worker_sees_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a torch that sees two GPUs, as no machine for tests does."""
    (tmp_path / "torch.py").write_text("class cuda:\n    device_count = staticmethod(lambda: 2)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("HETRAIN_DEVICE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)

    def seen(count: int | None = None) -> list[str | None]:
        return [each.get("CUDA_VISIBLE_DEVICES") for each in plan_workers(count)]

    assert seen() == ["0", "1"]
    assert seen(3) == ["0", "1", "0"]
    assert {each["HETRAIN_DEVICE"] for each in plan_workers(None)} == {"cuda"}
    assert all(int(each["OMP_NUM_THREADS"]) >= 1 for each in plan_workers(None))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5a, MIG-1b,nowhere")
    assert seen() == ["GPU-5a", "MIG-1b"]
    monkeypatch.setenv("HETRAIN_DEVICE", "cpu")
    assert seen() == [None]


def start_fleet(broker: Serving, model: Path, *options: str) -> subprocess.Popen[bytes]:
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
    broker: Serving, redis_client: redis.Redis, asker: Asker, model: Path, matrices: list[torch.Tensor]
) -> None:
    fleet = start_fleet(broker, model, "--workers", "2", "--concurrency", "3", "--weights-bytes", "20GB")
    try:
        assert eventually(lambda: len(cards(redis_client)) == 2)
        assert {card.concurrency for card, _ in cards(redis_client).values()} == {3}
        family = psutil.Process(fleet.pid).children(recursive=True)
        assert len(family) == 2
        password = broker.url.rsplit("@", 1)[0].rsplit(":", 1)[1]
        assert all(password not in " ".join(each.cmdline()) for each in (psutil.Process(fleet.pid), *family))
        assert served_by(asker, matrices, 2) == set(cards(redis_client))

        family[0].kill()
        assert eventually(lambda: len(family_of(fleet) - set(family)) == 1)
        names = set(cards(redis_client))
        assert eventually(lambda: len(cards(redis_client)) == 2)
        assert set(cards(redis_client)) == names  # it goes by the name of the one before
        assert served_by(asker, matrices, 2) == names

        family = list(family_of(fleet))
        x = operand(tokens=1 << 20)
        request = asker.evaluate(QUEUE, 3, x)
        asker.await_start(request)
        fleet.send_signal(signal.SIGTERM)
        assert fleet.wait(60) == 0
        assert (asker.result(request) == product(matrices[3], x)).all()  # it was finished first
        assert gone(family)
        assert not redis_client.exists(REGISTRY_KEY)
    finally:
        fleet.kill()
        fleet.wait()


def family_of(fleet: subprocess.Popen[bytes]) -> set[psutil.Process]:
    return set(psutil.Process(fleet.pid).children(recursive=True))


def served_by(asker: Asker, matrices: list[torch.Tensor], count: int) -> set[str]:
    """The names of those who answer, as soon as so many have."""
    names: set[str] = set()
    end = monotonic() + 60
    while len(names) < count and monotonic() < end:
        requests = [asker.evaluate(QUEUE, index, operand()) for index in range(GROUPS)]
        for request in requests:
            names.add(asker.answer(request).worker)
    return names


@pytest.mark.parametrize("how", ["interrupted twice", "killed"])
def test_a_worker_that_hangs_keeps_no_fleet_alive(
    broker: Serving, redis_client: redis.Redis, model: Path, how: str
) -> None:
    fleet = start_fleet(broker, model)
    try:
        assert eventually(lambda: cards(redis_client))
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
def test_a_fleet_that_cannot_work_says_so_and_ends(
    broker: Serving, options: tuple[str, ...], setting: dict[str, str], status: int, words: str
) -> None:
    environment = os.environ | {"HETRAIN_BROKER_URL": broker.url} | setting
    command = [*HETRAIN, "worker", *options]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == status, ended.stderr
    assert words in " ".join(ended.stderr.split())


def test_a_supervisor_refuses_settings_that_make_no_sense() -> None:
    command = [sys.executable, "-m", "tasks.supervisor.multi_gpu"]
    settings = {"HETRAIN_WEIGHTS_BYTES": "much", "HETRAIN_DEVICE": "cpu"}
    ended = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 78, ended.stderr
    assert "HETRAIN_WEIGHTS_BYTES: 'much' is no number of bytes" in ended.stderr


@pytest.mark.parametrize("pool", ["processes", "solo"])  # Celery itself replaces prefork by threads
def test_a_worker_refuses_another_pool_than_threads(broker: Serving, model: Path, pool: str) -> None:
    command = [sys.executable, "-m", "tasks", "worker", "-Q", QUEUE, "-P", pool]
    settings = {"HETRAIN_BROKER_URL": broker.url, "HETRAIN_MODELS": str(model)}
    ended = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 78, ended.stderr
    assert "hetrain worker cannot start: UsageError: -P: this worker's pool is not 'threads'" in ended.stderr
    assert "start it without -P" in ended.stderr
