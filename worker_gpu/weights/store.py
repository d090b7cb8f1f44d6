"""The models that a worker may serve, and the int8 matrices it holds, each checked against the plan."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from types import MappingProxyType

import torch

from hetrain.public.errors import HetrainError, ModelError, ModelUnreachable, StorageError, WorkerRefused
from hetrain.public.model.files import ModelFiles, label_of, resolve
from hetrain.public.model.quantization import matrix_digest
from hetrain.public.protocol.plan import Group, Plan, check_shapes, stack_group
from hetrain.public.settings import WorkerSettings
from worker_gpu.lru import LruCache

logger = logging.getLogger(__name__)

_GPU_SHARE = 0.75  # the rest is for operands and results


def served_models() -> dict[str, str]:
    """label -> name or path, of the models that the settings list.

    Only these: a message must not choose which files this machine opens.
    """
    return {label or label_of(path): path for label, path in WorkerSettings().models}


@functools.cache
def available_models() -> Mapping[str, str]:
    """Those of `served_models` whose files are here; found, converted or downloaded at the first call.

    Raises:
        ModelError: there is none; `ModelUnreachable` or `StorageError` if that may pass.
    """
    available: dict[str, str] = {}
    failure: HetrainError | None = None
    kind: type[HetrainError] = ModelError
    for label, path in served_models().items():
        try:
            resolve(path)
        except HetrainError as error:
            logger.error("this worker does not serve %s: %s", label, error)
            failure = error
            if isinstance(error, ModelUnreachable | StorageError):
                kind = type(error)
        else:
            available[label] = path
    if failure is not None and not available:
        raise kind(
            f"none of the models that this worker is to serve is here; the last one: {failure}",
            where="HETRAIN_MODELS",
            hint="name a model that is, or set HETRAIN_CACHE to where it lies",
        ) from failure
    return MappingProxyType(available)


def weights_limit(device: torch.device) -> int | None:
    """Bytes of matrices that a worker may hold; by default 3/4 of a GPU's memory, None (all) on a CPU."""
    limit = WorkerSettings().weights_bytes
    if limit is not None or device.type != "cuda":
        return limit
    return int(torch.cuda.get_device_properties(device).total_memory * _GPU_SHARE)


class WeightStore:
    """The int8 matrices of all jobs on this device, one per group digest. Thread-safe.

    Jobs on the same model share matrices. A group is loaded on first use or by `load_all`, and again after it
    was dropped for others. A matrix stays valid for the task that uses it.

    Args:
        device: where the matrices lie.
        models: label -> name or path; by default `available_models`.
        limit: bytes of matrices to hold; None for no limit.
    """

    def __init__(
        self, device: torch.device, models: Mapping[str, str] | None = None, limit: int | None = None
    ) -> None:
        self.device = device
        self.models = available_models() if models is None else models
        self._matrices: LruCache[torch.Tensor] = LruCache(limit, lambda matrix: matrix.nbytes)
        self._checkpoints: LruCache[ModelFiles] = LruCache()
        self._checked: set[tuple[str, Group]] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of matrices held."""
        return self._matrices.total

    def check(self, plan: Plan, own: Plan) -> None:
        """Compares a plan with the model, of which only the names and shapes of its tensors are read.

        Args:
            plan: the whole plan.
            own: the part of it that this worker serves.

        Raises:
            WorkerRefused: the model is not served here, or has no such tensors.
        """
        checkpoint = self._checkpoint(plan.model)
        for group in plan.groups:
            for member in group.members:
                if member.tensor not in checkpoint.tensors:
                    raise _misfit(plan.model, group, f"the checkpoint has no tensor {member.tensor}")
        for group in own.groups:
            try:
                check_shapes(group, checkpoint.shape)
            except HetrainError as error:
                raise _misfit(plan.model, group, error) from error

    def load_all(self, plan: Plan) -> None:
        """Checks every group, and holds those that fit without dropping others.

        Raises:
            WorkerRefused: as `matrix`, on the first group that differs from the plan.
        """
        for group in plan.groups:
            if group.digest in self._matrices or self._matrices.fits(group.out_features * group.in_features):
                self.matrix(plan.model, group)
            elif (plan.model, group) not in self._checked:
                _check_shape(self._load(plan.model, group), group)
                self._checked.add((plan.model, group))

    def matrix(self, model: str, group: Group) -> torch.Tensor:
        """Q int8 [out_features, in_features] of `group`, on the device.

        Raises:
            WorkerRefused: the model is not served here, or its weights differ from the client's.
        """
        matrix = self._matrices.get(group.digest, lambda: self._load(model, group).to(self.device))
        _check_shape(matrix, group)
        return matrix

    def _load(self, model: str, group: Group) -> torch.Tensor:
        checkpoint = self._checkpoint(model)
        try:
            values = stack_group(group.members, checkpoint.read).values
        except HetrainError as error:
            raise _misfit(model, group, error) from error
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


def _misfit(model: str, group: Group, error: HetrainError | str) -> WorkerRefused:
    return WorkerRefused(
        f"this worker's {model} does not fit the client's plan: {error}",
        where=group.name,
        hint="client and worker must hold the same checkpoint",
    )


def _check_shape(matrix: torch.Tensor, group: Group) -> None:
    if matrix.shape != (group.out_features, group.in_features):
        raise WorkerRefused(
            f"the plan says {group.out_features} × {group.in_features}, its matrix is "
            f"{matrix.shape[0]} × {matrix.shape[1]}",
            where=group.name,
            hint="the plan contradicts itself",
        )
