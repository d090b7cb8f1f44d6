"""The state of one worker process, behind two calls: prepare a job, evaluate a task."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from hetrain.public.errors import WireError, WorkerRefused
from hetrain.public.protocol.messages import EvaluateTask, PrepareTask
from hetrain.public.protocol.plan import Group, Plan, parse_plan
from hetrain.public.protocol.product import Product
from hetrain.public.protocol.registration import ShardRange
from hetrain.public.settings import WorkerSettings
from worker_gpu.copies import own_stream
from worker_gpu.device import Compute, choose_compute, choose_device
from worker_gpu.engines import Engine, open_engine
from worker_gpu.lru import LruCache
from worker_gpu.weights.shards import own_part, require_own_group
from worker_gpu.weights.store import WeightStore, weights_limit

PlanLoader = Callable[[], bytes | bytearray | memoryview]
_MAX_PLANS = 64


class Service:
    """Device, kernel, weights and the plans of recent jobs. Results depend on the arguments alone.

    Thread-safe: a task waits for another one's opening or loading only if it needs the same engine or matrix.

    Args:
        compute: device and kernel.
        weights: the matrices.
        shards: the part of every model that is served; None for all.
    """

    def __init__(self, compute: Compute, weights: WeightStore, shards: ShardRange | None = None) -> None:
        self._compute = compute
        self._weights = weights
        self._shards = shards
        self._engines: LruCache[Engine] = LruCache()
        self._plans: LruCache[Plan] = LruCache(_MAX_PLANS)

    @property
    def description(self) -> str:
        """Device and kernel, for logs."""
        return self._compute.description

    def describe(self, name: str) -> str:
        """The description of the engine called `name`; that of the device where there is no such engine."""
        try:
            return self.engine(name).description
        except WorkerRefused:
            return self.description

    def engine(self, name: str) -> Engine:
        """The engine called `name`, opened on first use. Raises `WorkerRefused` when there is none."""
        return self._engines.get(name, lambda: open_engine(name, self._compute))

    def prepare(self, task: PrepareTask, load_plan: PlanLoader) -> None:
        """Loads and checks a job's plan and matrices, and the engine's setup.

        Raises:
            WorkerRefused: unknown engine or model, other weights than the client's, or a setup that this
                worker's engine rejects.
            WireError: the plan is malformed.
        """
        engine = self.engine(task.engine)
        own = own_part(self._plan(task, load_plan), self._shards)
        engine.prepare(own, task.setup)
        self._weights.load_all(own)

    def check(self, task: EvaluateTask, load_plan: PlanLoader) -> None:
        """Checks a task, and the announced size of its operand, before that is fetched.

        Raises:
            WorkerRefused: unknown engine or model, or another plan than the model's.
            WireError: the task does not fit the plan, or the operand's size does not fit the task.
        """
        engine = self.engine(task.engine)
        plan = self._plan(task, load_plan)
        index, group = _group(plan, task)
        require_own_group(plan, index, self._shards)
        engine.check_operand(Product(group, task.direction), task)

    def evaluate(self, task: EvaluateTask, load_plan: PlanLoader, payload: memoryview) -> list[memoryview]:
        """Multiplies the operand by rows ``start:stop`` of the group's matrix in the task's direction.

        Returns:
            The result's parts, to be sent one after the other.

        Raises:
            WorkerRefused: as `prepare`, or the group lies in other shards.
            WireError: the task does not fit the plan, or the operand does not fit the task.
        """
        engine = self.engine(task.engine)
        plan = self._plan(task, load_plan)
        index, group = _group(plan, task)
        require_own_group(plan, index, self._shards)
        matrix = self._weights.matrix(plan.model, group)
        rows = matrix if task.direction == "forward" else matrix.t()
        with torch.inference_mode(), own_stream(self._compute.device):
            return engine.evaluate(rows[task.start : task.stop], task, payload)

    def _plan(self, task: PrepareTask | EvaluateTask, load_plan: PlanLoader) -> Plan:
        def load() -> Plan:
            found = parse_plan(load_plan(), task.plan_digest)
            self._weights.check(found, own_part(found, self._shards))
            return found

        plan = self._plans.get(task.plan_digest, load)
        if plan.model != task.model:
            raise WireError(f"the task is for model {task.model!r}, its plan for {plan.model!r}")
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
    """The process's service; the first call chooses device and kernel.

    Raises:
        HetrainError: the settings do not work on this machine.
    """
    device, shards = choose_device(), WorkerSettings().shards
    weights = WeightStore(device, limit=weights_limit(device))
    return Service(choose_compute(device), weights, shards)
