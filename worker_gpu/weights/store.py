"""What a worker may serve, and the int8 matrices it holds, each checked against the plan."""

from __future__ import annotations

import json
import os

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError

from hetrain.public.errors import HetrainError, ModelError, UsageError, WorkerRefused
from hetrain.public.model.files import ModelFiles, label_of, resolve
from hetrain.public.model.quantization import matrix_digest
from hetrain.public.protocol.plan import Group, Plan, stack_group
from worker_gpu.lru import Cache

DEFAULT_MODELS = "smollm2-135m"
_GPU_SHARE = 0.75  # the rest is for operands and results


def served_models() -> dict[str, str]:
    """label -> where to find it, from ``$HETRAIN_MODELS``.

    Names, paths or ``label=path``, comma-separated; or a JSON list of names and paths, whatever they contain.

    A list, not whatever a message asks for: a message must not choose which files this machine opens.
    """
    text = os.environ.get("HETRAIN_MODELS", DEFAULT_MODELS)
    if text.startswith("["):
        return {label_of(str(path)): str(path) for path in json.loads(text)}
    models = {}
    for entry in text.split(","):
        label, _, path = entry.strip().rpartition("=")
        if path:
            models[label or label_of(path)] = path
    return models


def weights_limit(device: torch.device) -> int | None:
    """Bytes of matrices that a worker may hold: ``$HETRAIN_WEIGHTS_BYTES``, as in 20GB or 512MiB.

    By default three quarters of a GPU's memory; no limit (None) on a CPU.

    Raises:
        UsageError: the variable is no positive size.
    """
    text = os.environ.get("HETRAIN_WEIGHTS_BYTES", "").strip()
    if not text:
        if device.type != "cuda":
            return None
        return int(torch.cuda.get_device_properties(device).total_memory * _GPU_SHARE)
    try:
        limit = int(TypeAdapter(ByteSize).validate_python(text))
    except (ValidationError, OverflowError):
        limit = 0
    if limit < 1:
        raise UsageError(
            f"{text[:100]!r} is no number of bytes",
            where="HETRAIN_WEIGHTS_BYTES",
            hint="such as 20GB or 512MiB",
        )
    return limit


class WeightStore:
    """The int8 matrices of all jobs on this device, one per group digest. Thread-safe.

    Jobs on the same model share matrices. A group is loaded on first use or by `load_all`, and again when it
    had to make room for others; what a task is using stays for it until it ends.

    Args:
        device: where the matrices lie.
        models: label -> where to find it; by default `served_models`.
        limit: bytes of matrices to hold; None for no limit.
    """

    def __init__(
        self, device: torch.device, models: dict[str, str] | None = None, limit: int | None = None
    ) -> None:
        self.device = device
        self.models = served_models() if models is None else models
        self._matrices: Cache[torch.Tensor] = Cache(limit, lambda matrix: matrix.nbytes)
        self._checkpoints: Cache[ModelFiles] = Cache()
        self._checked: set[tuple[str, Group]] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of matrices held."""
        return self._matrices.total

    def load_all(self, plan: Plan) -> None:
        """Checks every group, and keeps as many as there is room for: nothing has to go.

        Raises:
            WorkerRefused: as `matrix`, on the first group that differs from the plan.
        """
        for group in plan.groups:
            if group.digest in self._matrices or self._matrices.has_room(
                group.out_features * group.in_features
            ):
                self.matrix(plan.model, group)
            elif (plan.model, group) not in self._checked:
                _check_shape(self._load(plan.model, group), group)
                self._checked.add((plan.model, group))

    def matrix(self, model: str, group: Group) -> torch.Tensor:
        """Q int8 [out_features, in_features] of `group`, on the device.

        Raises:
            WorkerRefused: the model is not served here, or its weights are not the client's.
        """
        matrix = self._matrices.get(group.digest, lambda: self._load(model, group).to(self.device))
        _check_shape(matrix, group)
        return matrix

    def _load(self, model: str, group: Group) -> torch.Tensor:
        checkpoint = self._checkpoint(model)
        try:
            values = stack_group(group.members, checkpoint.read).values
        except HetrainError as error:
            raise WorkerRefused(
                f"this worker's {model} does not fit the client's plan: {error}",
                where=group.name,
                hint="client and worker must hold the same checkpoint",
            ) from error
        if matrix_digest(values) != group.digest:
            raise WorkerRefused(
                f"this worker's weights of {model} differ from the client's",
                where=group.name,
                hint="client and worker must hold the same checkpoint, to the bit",
            )
        return values

    def _checkpoint(self, model: str) -> ModelFiles:
        if model not in self.models:
            raise WorkerRefused(
                f"this worker does not serve model {model!r}, only: {', '.join(self.models)}",
                hint="start it with HETRAIN_MODELS=<name or path> in its environment",
            )
        try:
            return self._checkpoints.get(model, lambda: resolve(self.models[model]))
        except ModelError as error:
            raise WorkerRefused(f"this worker cannot load {model!r}: {error}") from error


def _check_shape(matrix: torch.Tensor, group: Group) -> None:
    if matrix.shape != (group.out_features, group.in_features):
        raise WorkerRefused(
            f"the plan says {group.out_features} × {group.in_features}, its matrix is "
            f"{matrix.shape[0]} × {matrix.shape[1]}",
            where=group.name,
            hint="the plan contradicts itself",
        )
