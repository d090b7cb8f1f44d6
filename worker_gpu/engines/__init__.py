"""One module per engine's evaluating half, registered in one table and chosen by name once per job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Protocol

import torch

from hetrain.public.errors import WorkerRefused
from hetrain.public.protocol.messages import EvaluateTask, Header
from hetrain.public.protocol.plan import Plan
from worker_gpu.device import Compute
from worker_gpu.engines import clear, rlwe
from worker_gpu.engines.concrete import ConcreteEngine
from worker_gpu.engines.stateless import StatelessEngine


class Engine(Protocol):
    """An evaluating half: multiplies an encrypted operand by a public int8 matrix."""

    @property
    def description(self) -> str:
        """What it computes on, for logs and results."""
        ...

    def prepare(self, plan: Plan, setup: Header) -> None:
        """Makes ready for a job. Raises `WorkerRefused` when it cannot agree to the client's setup."""
        ...

    def evaluate(self, matrix: torch.Tensor, task: EvaluateTask, payload: memoryview) -> list[memoryview]:
        """The result's parts, to be sent one after the other.

        Args:
            matrix: int8 [n, K] on the device: the rows that the task asks for, in its direction.
            task: the validated message; its header is checked here.
            payload: the uploaded operand, of unknown content.

        Raises:
            WireError: header or payload do not fit the matrix.
        """
        ...


ENGINES: Mapping[str, Callable[[Compute], Engine]] = MappingProxyType(
    {
        "rlwe": partial(StatelessEngine, product=rlwe.evaluate),
        "concrete": ConcreteEngine,
        "clear": partial(StatelessEngine, product=clear.evaluate),
    }
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
