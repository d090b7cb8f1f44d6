"""Everything one worker process holds, behind two calls: prepare a job, evaluate a task."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from hetrain.public.errors import WireError, WorkerRefused
from hetrain.public.protocol.messages import EvaluateTask, PrepareTask
from hetrain.public.protocol.plan import Group, Plan, parse_plan
from hetrain.public.protocol.product import Product
from hetrain.public.protocol.registration import ShardRange
from worker_gpu.copies import own_stream
from worker_gpu.device import Compute, choose_compute, choose_device
from worker_gpu.engines import Engine, open_engine
from worker_gpu.lru import Cache
from worker_gpu.weights.shards import own_part, refuse_others, served_shards
from worker_gpu.weights.store import WeightStore, weights_limit

PlanLoader = Callable[[], bytes | bytearray | memoryview]
_MAX_PLANS = 64


class Service:
    """Device, kernel, weights and the plans of recent jobs. Results depend on the arguments alone.

    Thread-safe: what one task has to open or load first keeps no other waiting that does not need it.

    Args:
        compute: device and kernel.
        weights: the matrices.
        shards: the part of every model that is served; None for all.
    """

    def __init__(self, compute: Compute, weights: WeightStore, shards: ShardRange | None = None) -> None:
        self._compute = compute
        self._weights = weights
        self._shards = shards
        self._engines: Cache[Engine] = Cache()
        self._plans: Cache[Plan] = Cache(_MAX_PLANS)

    @property
    def description(self) -> str:
        """Device and kernel, for logs."""
        return self._compute.description

    def describe(self, name: str) -> str:
        """What the engine called `name` computes on; the device where there is no such engine."""
        try:
            return self.engine(name).description
        except WorkerRefused:
            return self.description

    def engine(self, name: str) -> Engine:
        """The engine called `name`, opened on first use. Raises `WorkerRefused` when there is none."""
        return self._engines.get(name, lambda: open_engine(name, self._compute))

    def prepare(self, task: PrepareTask, load_plan: PlanLoader) -> None:
        """Loads and checks all that a job needs of this worker.

        Raises:
            WorkerRefused: unknown engine or model, other weights than the client's, or a setup that this
                worker cannot agree to.
            WireError: the plan is malformed.
        """
        half = self.engine(task.engine)
        own = own_part(self._plan(task, load_plan), self._shards)
        half.prepare(own, task.setup)
        self._weights.load_all(own)

    def evaluate(self, task: EvaluateTask, load_plan: PlanLoader, payload: memoryview) -> list[memoryview]:
        """Multiplies the operand by rows ``start:stop`` of the group's matrix in the task's direction.

        Returns:
            The result's parts, to be sent one after the other.

        Raises:
            WorkerRefused: as `prepare`, or the group lies in other shards.
            WireError: the task does not fit the plan, or the operand does not fit the task.
        """
        half = self.engine(task.engine)
        plan = self._plan(task, load_plan)
        index, group = _group(plan, task)
        refuse_others(plan, index, self._shards)
        matrix = self._weights.matrix(plan.model, group)
        rows = matrix if task.direction == "forward" else matrix.t()
        with torch.inference_mode(), own_stream(self._compute.device):
            return half.evaluate(rows[task.start : task.stop], task, payload)

    def _plan(self, task: PrepareTask | EvaluateTask, load_plan: PlanLoader) -> Plan:
        plan = self._plans.get(task.plan_digest, lambda: parse_plan(load_plan(), task.plan_digest))
        if plan.model != task.model:
            raise WireError(f"the task says model {task.model!r}, its plan {plan.model!r}")
        return plan


def _group(plan: Plan, task: EvaluateTask) -> tuple[int, Group]:
    for index, group in enumerate(plan.groups):
        if group.name == task.group:
            if task.start < task.stop <= Product(group, task.direction).n:
                return index, group
            raise WireError(f"rows {task.start}:{task.stop} are out of range", where=task.group)
    raise WireError("the plan has no such group", where=task.group)


@functools.cache
def service() -> Service:
    """The process's service: device and kernel are chosen on the first call.

    Raises:
        HetrainError: its configuration makes no sense here.
    """
    device, shards = choose_device(), served_shards()
    weights = WeightStore(device, limit=weights_limit(device))
    return Service(choose_compute(device), weights, shards)
