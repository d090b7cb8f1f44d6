"""What a worker reads that a tenant may have written: queue messages, tasks, plans, headers, operands."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from hetrain.public.concrete.circuits import tile
from hetrain.public.concrete.header import ConcreteHeader, ConcreteSetup
from hetrain.public.errors import WireError, WorkerRefused
from hetrain.public.lattice.header import RlweHeader
from hetrain.public.lattice.parameters import PARAMETER_SETS
from hetrain.public.protocol.messages import (
    QUEUE,
    Blob,
    EngineHeader,
    EvaluateTask,
    Header,
    PrepareTask,
    parse,
)
from hetrain.public.protocol.plan import Plan
from hetrain.public.protocol.registration import ShardRange
from tasks.intake.control_message import COMMANDS, check_command
from tasks.intake.envelope import Accepted, Refused
from tasks.intake.task_message import check_task
from tests.fuzz.run import Opened, Target
from tests.harness.checkpoints import IN, OUT, load_matrices, operand, plan_of, save_matrices
from tests.harness.queue_messages import body, command_message, task_message
from worker_gpu.device import Compute
from worker_gpu.kernels import KERNELS
from worker_gpu.service import Service
from worker_gpu.weights.store import WeightStore

CPU = torch.device("cpu")
TOKEN = "0123456789abcdef" * 2
(_PARAMETERS, *_) = PARAMETER_SETS
_CIPHERTEXT = {"parameters": _PARAMETERS, "operand": "ciphertext"}
_SEED = _CIPHERTEXT | {"operand": "mask_seed"}
_CIRCUIT = tile(IN, OUT, 127)
_CONCRETE = {"circuit": "0" * 64, "rows": _CIRCUIT.rows, "columns": _CIRCUIT.columns, "x_max": 127}
_OPERAND_BYTES = {"clear": 3 * IN * 5, "rlwe": 3 * PARAMETER_SETS[_PARAMETERS].ring_degree * IN}


def blob(kind: Any, nbytes: int) -> Blob:
    """A blob of the job of all valid inputs."""
    return Blob(job=TOKEN, kind=kind, token=TOKEN, nbytes=nbytes)


def _job(plan: Plan, engine: str) -> dict[str, Any]:
    where = blob("plan", len(plan.to_bytes()))
    return {
        "request": TOKEN,
        "job": TOKEN,
        "model": plan.model,
        "engine": engine,
        "plan": where,
        "plan_digest": plan.digest,
    }


def evaluate_task(plan: Plan, engine: str, header: Header, nbytes: int) -> EvaluateTask:
    """A valid task for the whole of the first group."""
    return EvaluateTask(
        **_job(plan, engine),
        group="g0",
        direction="forward",
        start=0,
        stop=OUT,
        header=dict(header),
        input=blob("in", nbytes),
    )


def _service(directory: Path, shards: ShardRange | None = None) -> Service:
    compute = Compute(CPU, "int8", KERNELS["int8"])
    return Service(compute, WeightStore(CPU, {"tiny": str(directory / "tiny")}), shards)


def _model(directory: Path) -> tuple[Service, Plan]:
    save_matrices(directory / "tiny")
    return _service(directory), plan_of(load_matrices(directory / "tiny"))


def _verdict(verdict: Accepted | Refused) -> object:
    if isinstance(verdict, Refused) and not (verdict.reason.isprintable() and 0 < len(verdict.reason) <= 200):
        raise AssertionError(f"a reason of {len(verdict.reason)} characters")
    return verdict


def _task_message(_: Path, __: ExitStack) -> Opened:
    ids = {
        "headers": {"id": TOKEN, "root_id": TOKEN},
        "properties": {"correlation_id": TOKEN, "delivery_tag": "1"},
    }
    seeds = [task_message(content, **ids) for content in (None, body(["x"]), body(["{}" * 100]))]
    return Opened(seeds, lambda data: _verdict(check_task(data, QUEUE)))


def _task_body(directory: Path, _: ExitStack) -> Opened:
    """The body of a message that is a client's in all else, and the task in it."""
    _, plan = _model(directory)
    task = evaluate_task(plan, "clear", {}, 72).to_json()

    def run(data: bytes) -> object:
        verdict = _verdict(check_task(task_message(data), QUEUE))
        if isinstance(verdict, Accepted):
            return parse(EvaluateTask, json.loads(data)[0][0], where="task message")
        return verdict

    return Opened([body([task]), body(["{}"])], run)


def _control(_: Path, __: ExitStack) -> Opened:
    arguments = {
        "query_task": {"ids": ["a"]},
        "registered": {"taskinfoitems": ["x"]},
        "active": {"safe": True},
    }
    seeds = [command_message(name, arguments.get(name)) for name in COMMANDS]
    return Opened(seeds, lambda data: _verdict(check_command(data)))


def _evaluate(directory: Path, _: ExitStack) -> Opened:
    """A task of each engine, up to where its operand would be fetched."""
    service, plan = _model(directory)
    seeds = [
        evaluate_task(plan, engine, header, nbytes).to_json().encode()
        for engine, header, nbytes in (
            ("clear", {}, 3 * IN),
            ("rlwe", _CIPHERTEXT, _OPERAND_BYTES["rlwe"]),
            ("rlwe", _SEED, 32),
            ("concrete", _CONCRETE, _CIRCUIT.operand_bytes),
        )
    ]

    def run(data: bytes) -> object:
        return service.check(parse(EvaluateTask, data, where="task message"), plan.to_bytes)

    for seed in seeds:  # engines open with their first task
        with suppress(WorkerRefused):
            run(seed)
    return Opened(seeds, run)


def _prepare(directory: Path, _: ExitStack) -> Opened:
    service, plan = _model(directory)
    seeds = [PrepareTask(**_job(plan, engine)).to_json().encode() for engine in ("clear", "rlwe")]

    def run(data: bytes) -> object:
        return service.prepare(parse(PrepareTask, data, where="task message"), plan.to_bytes)

    return Opened(seeds, run)


def _plan(directory: Path, _: ExitStack) -> Opened:
    """A plan, announced with its own digest, to a worker of the whole model and to one of a part."""
    whole, plan = _model(directory)
    part = _service(directory, ShardRange.parse("1-2/3"))

    def run(data: bytes) -> object:
        task = PrepareTask(**_job(plan, "clear") | {"plan_digest": hashlib.sha256(data).hexdigest()})
        with suppress(WireError, WorkerRefused):
            part.prepare(task, lambda: data)
        return whole.prepare(task, lambda: data)

    return Opened([plan.to_bytes(), plan.model_copy(update={"groups": plan.groups[:1]}).to_bytes()], run)


def _headers(_: Path, __: ExitStack) -> Opened:
    """Each engine's header and setup, and the sizes that follow from it."""
    setup = {"package_version": "2.11.0", "x_max": 127, "circuits": {_CIRCUIT.name: "0" * 64}}
    readers: tuple[Callable[[Header], object], ...] = (
        lambda header: EngineHeader.from_wire(header, where="g0"),
        lambda header: RlweHeader.from_wire(header, where="g0").result_format.operand_bytes(IN),
        lambda header: ConcreteHeader.from_wire(header, where="g0").spec(IN).operand_bytes,
        lambda header: ConcreteSetup.from_wire(header, where="setup"),
    )

    def run(data: bytes) -> object:
        try:
            header = json.loads(data)
        except (ValueError, RecursionError):
            return None
        if not isinstance(header, Mapping):  # as fields of a task they are objects
            return None
        read = []
        for reader in readers:
            with suppress(WireError):
                read.append(reader(header))
        return read or readers[len(data) % len(readers)](header)

    return Opened([json.dumps(each).encode() for each in ({}, _CIPHERTEXT, _SEED, _CONCRETE, setup)], run)


def _operand(directory: Path, _: ExitStack) -> Opened:
    """An operand of any bytes, as three kinds."""
    service, plan = _model(directory)
    kinds = [
        evaluate_task(plan, engine, header, 1)
        for engine, header in (("clear", {}), ("rlwe", _CIPHERTEXT), ("rlwe", _SEED))
    ]

    def run(data: bytes) -> object:
        for task in kinds:
            with suppress(WireError):
                service.evaluate(task, plan.to_bytes, memoryview(bytearray(data)))
        return service.evaluate(kinds[len(data) % 3], plan.to_bytes, memoryview(bytearray(data)))

    return Opened([operand().tobytes(), bytes(_OPERAND_BYTES["rlwe"]), bytes(32)], run)


_REFUSED = (WireError, WorkerRefused)
WORKER_TARGETS = (
    Target("task-message", _task_message, ()),
    Target("task-body", _task_body, (WireError,)),
    Target("control-message", _control, ()),
    Target("evaluate-task", _evaluate, _REFUSED),
    Target("prepare-task", _prepare, _REFUSED),
    Target("plan", _plan, _REFUSED),
    Target("engine-headers", _headers, (WireError,)),
    Target("operand", _operand, _REFUSED, longest=1 << 16, multiple=300),
)
