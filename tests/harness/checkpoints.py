"""A checkpoint of a few random matrices, its plan, and what products of its int8 matrices must be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from hetrain.public.model.quantization import quantize
from hetrain.public.protocol.plan import Member, Plan, group_of

OUT, IN, GROUPS = 40, 24, 6


def save_matrices(directory: Path) -> None:
    """Saves a checkpoint with one matrix [OUT, IN] for each group, ``g0`` to ``g5``, to a new directory."""
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    generator = torch.Generator().manual_seed(1)
    names = [f"g{index}.weight" for index in range(GROUPS)]
    save_file({n: torch.randn(OUT, IN, generator=generator) for n in names}, directory / "model.safetensors")


def load_matrices(directory: Path) -> list[torch.Tensor]:
    """The int8 forms of the matrices of `save_matrices`."""
    tensors = load_file(directory / "model.safetensors")
    return [quantize(tensors[f"g{index}.weight"]).values for index in range(GROUPS)]


def plan_of(matrices: list[torch.Tensor]) -> Plan:
    """The plan of a model ``tiny`` with these matrices."""
    groups = []
    for index, matrix in enumerate(matrices):
        members = (Member(module=f"g{index}", tensor=f"g{index}.weight", out_features=OUT),)
        groups.append(group_of(members, matrix))
    return Plan(model="tiny", groups=tuple(groups))


def operand(seed: int = 0, tokens: int = 5) -> np.ndarray:
    """Random digit planes, int8 [3, T, IN]."""
    return np.random.default_rng(seed).integers(-128, 128, (3, tokens, IN), dtype=np.int8)


def product(matrix: torch.Tensor, x: np.ndarray) -> np.ndarray:
    """What `clear` answers: Σ_l 2^(8l)·x_l·Wᵀ, int32 [T, OUT]; no sum passes 2^36, and results wrap."""
    values = sum(digits.astype(np.int64) << (8 * position) for position, digits in enumerate(x))
    return (values @ matrix.numpy().astype(np.int64).T).astype(np.int32)
