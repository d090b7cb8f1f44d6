"""What a worker refuses before it fetches, keeps or compiles anything for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hetrain.public.concrete.circuits import tile
from hetrain.public.errors import HetrainError, WireError, WorkerRefused
from hetrain.public.lattice.parameters import PARAMETER_SETS, SLOTS
from hetrain.public.protocol.messages import Blob, EvaluateTask, PrepareTask, new_token
from hetrain.public.protocol.plan import MAX_PLAN_BYTES, Group, Plan, parse_plan
from tests.harness.checkpoints import IN, OUT, load_matrices, plan_of, save_matrices
from worker_gpu.device import Compute
from worker_gpu.kernels import KERNELS
from worker_gpu.service import Service
from worker_gpu.weights.store import WeightStore

CPU = torch.device("cpu")
(PARAMETERS, *_) = PARAMETER_SETS
DEGREE = PARAMETER_SETS[PARAMETERS].ring_degree
CIRCUIT = tile(IN, OUT, 127)
CONCRETE = {"circuit": "0" * 64, "rows": CIRCUIT.rows, "columns": CIRCUIT.columns, "x_max": 127}
CIPHERTEXT = {"parameters": PARAMETERS, "operand": "ciphertext"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_matrices(directory)
    return directory


@pytest.fixture(scope="module")
def plan(model: Path) -> Plan:
    return plan_of(load_matrices(model))


@pytest.fixture(scope="module")
def service(model: Path) -> Service:
    return Service(Compute(CPU, "int8", KERNELS["int8"]), WeightStore(CPU, {"tiny": str(model)}))


def fields(plan: Plan, engine: str) -> dict[str, Any]:
    blob = Blob(job=new_token(), kind="plan", token=plan.digest, nbytes=len(plan.to_bytes()))
    job = {"job": blob.job, "model": plan.model, "engine": engine, "plan": blob}
    return {"request": new_token(), "plan_digest": plan.digest, **job}


def changed(group: Group, **values: Any) -> Group:
    """`group` with other values of its only member, or of itself."""
    (member,) = group.members
    inner = {name: values.pop(name) for name in ("out_features", "tensor", "transposed") if name in values}
    return group.model_copy(update={"members": (member.model_copy(update=inner),), **values})


def test_a_plan_has_at_most_four_mebibytes(plan: Plan) -> None:
    data = plan.to_bytes()
    padding = b" " * (MAX_PLAN_BYTES - len(data))
    with pytest.raises(WireError, match="digest"):
        parse_plan(data + padding, plan.digest)
    with pytest.raises(WireError, match="4194305 bytes, of 4194304 at most"):
        parse_plan(data + padding + b" ", plan.digest)


@pytest.mark.parametrize("engine", ["clear", "rlwe", "concrete"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_features": 1 << 24}, r"has shape 40×24, the plan says 16777216 outputs and 24 inputs"),
        ({"in_features": 1 << 24}, r"the plan says 40 outputs and 16777216 inputs"),
        ({"transposed": True}, r"has shape 40×24"),
        ({"tensor": "config.json"}, "has no tensor config.json"),
    ],
)
def test_a_plan_that_is_not_the_model_s_is_neither_kept_nor_compiled(
    service: Service, plan: Plan, engine: str, change: Mapping[str, Any], message: str
) -> None:
    wrong = plan.model_copy(update={"groups": (*plan.groups[:-1], changed(plan.groups[-1], **change))})
    fetched: list[Plan] = []

    def fetch() -> bytes:
        fetched.append(wrong)
        return wrong.to_bytes()

    for _ in range(2):
        with pytest.raises(WorkerRefused, match=message):
            service.prepare(PrepareTask(**fields(wrong, engine)), fetch)
    assert len(fetched) == 2


@pytest.mark.parametrize(
    ("engine", "header", "unit", "most"),
    [
        ("clear", {}, 3 * IN, 3 * IN << 16),
        ("rlwe", CIPHERTEXT, 3 * DEGREE * IN, 3 * DEGREE * IN),
        ("rlwe", CIPHERTEXT | {"operand": "mask_seed"}, 32, 32),
        ("concrete", CONCRETE, CIRCUIT.operand_bytes, CIRCUIT.operand_bytes * SLOTS),
    ],
)
def test_the_size_of_an_operand_is_checked_before_it_is_fetched(
    service: Service, plan: Plan, engine: str, header: Mapping[str, Any], unit: int, most: int
) -> None:
    def check(nbytes: int, **more: Any) -> None:
        values = {"group": "g0", "direction": "forward", "start": 0, "stop": OUT, "header": dict(header)}
        common = fields(plan, engine)
        blob = Blob(job=common["job"], kind="in", token=new_token(), nbytes=nbytes)
        service.check(EvaluateTask(**common | values | more, input=blob), plan.to_bytes)

    check(unit)
    check(most)
    for nbytes in (0, unit - 1, unit + 1, most + unit, 4 << 30):
        with pytest.raises(WireError, match=f"has {nbytes} bytes"):
            check(nbytes)
    for more in ({"stop": OUT + 1}, {"group": "other"}, {"header": {"a": 1}}, {"model": "other"}):
        with pytest.raises(HetrainError):
            check(unit, **more)


@pytest.mark.parametrize("change", [{"rows": 1}, {"columns": 1}, {"x_max": 126}, {"x_max": 1 << 16}])
def test_only_the_product_s_own_circuit_is_compiled(
    service: Service, plan: Plan, change: dict[str, int]
) -> None:
    common = fields(plan, "concrete")
    task = EvaluateTask(
        **common,
        group="g0",
        direction="forward",
        start=0,
        stop=OUT,
        header=CONCRETE | change,
        input=Blob(job=common["job"], kind="in", token=new_token(), nbytes=CIRCUIT.operand_bytes),
    )
    with pytest.raises(WireError, match=r"is not the circuit of g0 forward|power of two"):
        service.check(task, plan.to_bytes)
