"""A worker's memory for weights, its caches, and the devices that a supervisor gives its workers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from hetrain.public.errors import UsageError, WorkerRefused
from hetrain.public.protocol.messages import EvaluateTask, new_token
from hetrain.public.protocol.plan import Plan
from tasks.supervisor.multi_gpu import plan_workers
from tests.harness.checkpoints import GROUPS, IN, OUT, load_matrices, operand, plan_of, product, save_matrices
from worker_gpu.device import Compute
from worker_gpu.kernels import KERNELS
from worker_gpu.lru import LruCache
from worker_gpu.service import Service
from worker_gpu.weights.store import WeightStore, weights_limit

CPU = torch.device("cpu")


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
    return np.frombuffer(part, np.int32).reshape(-1, OUT)


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


def test_a_slow_entry_delays_no_other_and_is_made_once() -> None:
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
