"""What a worker may serve, and the int8 matrices it holds, each checked against the plan."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass, field

import torch

from hetrain.public.checkpoints import Checkpoint, label_of, resolve
from hetrain.public.errors import HetrainError, ModelError, WorkerRefused
from hetrain.public.plan import Group, Plan, stack_group
from hetrain.public.weights import matrix_digest

DEFAULT_MODELS = "smollm2-135m"


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


@dataclass
class WeightStore:
    """The int8 matrices of all jobs on this device, one per group digest.

    Jobs on the same model share matrices; a group is loaded on first use or by `load_all`.
    """

    device: torch.device
    models: dict[str, str] = field(default_factory=served_models)
    _matrices: dict[str, torch.Tensor] = field(default_factory=dict)
    _checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def load_all(self, plan: Plan) -> None:
        """Loads and checks every group. Raises `WorkerRefused` on the first that differs from the plan."""
        for group in plan.groups:
            self.matrix(plan.model, group)

    def matrix(self, model: str, group: Group) -> torch.Tensor:
        """Q int8 [out_features, in_features] of `group`, on the device.

        Raises:
            WorkerRefused: the model is not served here, or its weights are not the client's.
        """
        with self._lock:
            if group.digest not in self._matrices:
                self._matrices[group.digest] = self._load(model, group).to(self.device)
            matrix = self._matrices[group.digest]
        if matrix.shape != (group.out_features, group.in_features):
            raise WorkerRefused(
                f"the plan says {group.out_features} × {group.in_features}, its matrix is "
                f"{matrix.shape[0]} × {matrix.shape[1]}",
                where=group.name,
                hint="the plan contradicts itself",
            )
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

    def _checkpoint(self, model: str) -> Checkpoint:
        if model not in self._checkpoints:
            if model not in self.models:
                raise WorkerRefused(
                    f"this worker does not serve model {model!r}, only: {', '.join(self.models)}",
                    hint="start it with HETRAIN_MODELS=<name or path> in its environment",
                )
            try:
                self._checkpoints[model] = resolve(self.models[model])
            except ModelError as error:
                raise WorkerRefused(f"this worker cannot load {model!r}: {error}") from error
        return self._checkpoints[model]
