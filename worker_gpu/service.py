"""Everything one worker process holds, behind two calls: prepare a job, evaluate a task."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable

import torch

from hetrain.public.errors import WireError, WorkerRefused
from hetrain.public.plan import Group, Plan, parse_plan
from hetrain.public.wire import EvaluateTask, PrepareTask
from worker_gpu.device import Compute, choose_compute, choose_device
from worker_gpu.engines import Engine, open_engine
from worker_gpu.weights import WeightStore

PlanLoader = Callable[[], bytes | bytearray | memoryview]
_MAX_PLANS = 64


class Service:
    """Device, kernel, weights and the plans of recent jobs. Results depend on the arguments alone."""

    def __init__(self, compute: Compute, weights: WeightStore) -> None:
        self._compute = compute
        self._weights = weights
        self._engines: dict[str, Engine] = {}
        self._plans: OrderedDict[str, Plan] = OrderedDict()
        self._lock = threading.Lock()

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
        with self._lock:
            if name not in self._engines:
                self._engines[name] = open_engine(name, self._compute)
            return self._engines[name]

    def prepare(self, task: PrepareTask, load_plan: PlanLoader) -> None:
        """Loads and checks all that a job needs.

        Raises:
            WorkerRefused: unknown engine or model, other weights than the client's, or a setup that this
                worker cannot agree to.
            WireError: the plan is malformed.
        """
        half = self.engine(task.engine)
        plan = self._plan(task, load_plan)
        half.prepare(plan, task.setup)
        self._weights.load_all(plan)

    def evaluate(self, task: EvaluateTask, load_plan: PlanLoader, payload: memoryview) -> list[memoryview]:
        """Multiplies the operand by rows ``start:stop`` of the group's matrix in the task's direction.

        Returns:
            The result's parts, to be sent one after the other.

        Raises:
            WorkerRefused: as `prepare`.
            WireError: the task does not fit the plan, or the operand does not fit the task.
        """
        half = self.engine(task.engine)
        plan = self._plan(task, load_plan)
        group = _group(plan, task)
        matrix = self._weights.matrix(plan.model, group)
        rows = matrix if task.direction == "forward" else matrix.t()
        with torch.inference_mode():
            return half.evaluate(rows[task.start : task.stop], task, payload)

    def _plan(self, task: PrepareTask | EvaluateTask, load_plan: PlanLoader) -> Plan:
        with self._lock:
            plan = self._plans.pop(task.plan_digest, None)
            if plan is None:
                plan = parse_plan(load_plan(), task.plan_digest)
            self._plans[task.plan_digest] = plan  # now the youngest
            while len(self._plans) > _MAX_PLANS:
                self._plans.popitem(last=False)
        if plan.model != task.model:
            raise WireError(f"the task says model {task.model!r}, its plan {plan.model!r}")
        return plan


def _group(plan: Plan, task: EvaluateTask) -> Group:
    for group in plan.groups:
        if group.name == task.group:
            if task.start < task.stop <= group.result_rows(task.direction):
                return group
            raise WireError(f"rows {task.start}:{task.stop} are out of range", where=task.group)
    raise WireError("the plan has no such group", where=task.group)


@functools.cache
def service() -> Service:
    """The process's service: device and kernel are chosen on the first call."""
    compute = choose_compute(choose_device())
    return Service(compute, WeightStore(compute.device))
