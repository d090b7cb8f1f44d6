"""The evaluating half of each engine: one module for each, and the table of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

import torch

from hetrain.public.errors import WorkerRefused
from hetrain.public.protocol.messages import EvaluateTask, Header
from hetrain.public.protocol.plan import Plan
from hetrain.public.protocol.product import Product
from worker_gpu.device import Compute
from worker_gpu.engines.clear import ClearEngine
from worker_gpu.engines.concrete import ConcreteEngine
from worker_gpu.engines.rlwe import RlweEngine


class Engine(Protocol):
    """An evaluating half: multiplies an encrypted operand by a public int8 matrix."""

    @property
    def description(self) -> str:
        """Device and kernel, for logs and results."""
        ...

    def prepare(self, plan: Plan, setup: Header) -> None:
        """Prepares a job.

        Args:
            plan: the job's products that this worker serves.
            setup: the client's, parsed here.

        Raises:
            WireError: the setup is malformed.
            WorkerRefused: the worker cannot agree to it.
        """
        ...

    def check_operand(self, product: Product, task: EvaluateTask) -> None:
        """Checks the task's header, and the size that it announces for its operand.

        Args:
            product: the whole product of which the task asks for some rows.
            task: the validated message; its header is parsed here.

        Raises:
            WireError: an operand of this size cannot be one of this product's.
        """
        ...

    def evaluate(self, matrix: torch.Tensor, task: EvaluateTask, payload: memoryview) -> list[memoryview]:
        """The result's parts, to be sent one after the other.

        Args:
            matrix: int8 [n, K] on the device: the rows that the task asks for, in its direction.
            task: the validated message; its header is parsed here.
            payload: the uploaded operand, of unknown content.

        Raises:
            WireError: header or payload do not fit the matrix.
        """
        ...


ENGINES: Mapping[str, Callable[[Compute], Engine]] = MappingProxyType(
    {"rlwe": RlweEngine, "concrete": ConcreteEngine, "clear": ClearEngine}
)


def open_engine(name: str, compute: Compute) -> Engine:
    """The engine called `name` on this worker's device. Raises `WorkerRefused` when it has none."""
    try:
        opener = ENGINES[name]
    except KeyError:
        raise WorkerRefused(
            f"this worker has no engine {name!r}, only: {', '.join(ENGINES)}",
            hint="start a worker with that engine installed, or choose another `engine`",
        ) from None
    return opener(compute)
