"""One module per engine's evaluating half, registered in one table and chosen by name once per job."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch

from hetrain.public.errors import WorkerRefused
from hetrain.public.wire import EvaluateTask
from worker_gpu.device import Compute
from worker_gpu.engines import clear, rlwe


class Engine(Protocol):
    """An evaluating half: multiplies an encrypted operand by a public int8 matrix."""

    def __call__(
        self, compute: Compute, matrix: torch.Tensor, task: EvaluateTask, payload: memoryview
    ) -> list[memoryview]:
        """The result's parts, to be sent one after the other.

        Args:
            compute: device and kernel.
            matrix: int8 [n, K] on the device: the rows that the task asks for, in its direction.
            task: the validated message; its header is checked here.
            payload: the uploaded operand, of unknown content.

        Raises:
            WireError: header or payload do not fit the matrix.
        """
        ...


ENGINES: Mapping[str, Engine] = MappingProxyType({"rlwe": rlwe.evaluate, "clear": clear.evaluate})


def engine(name: str) -> Engine:
    """The engine called `name`. Raises `WorkerRefused` when this worker has none of that name."""
    try:
        return ENGINES[name]
    except KeyError:
        raise WorkerRefused(
            f"this worker has no engine {name!r}, only: {', '.join(ENGINES)}",
            hint="start a worker with that engine installed, or choose another --engine",
        ) from None
