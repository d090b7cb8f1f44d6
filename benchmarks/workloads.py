"""Matrices and activations to multiply, each matrix in a checkpoint of its own plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from benchmarks.data import CORPUS
from hetrain.nn.split import split_model
from hetrain.public.lattice.parameters import SLOTS
from hetrain.public.model.files import ModelFiles, resolve
from hetrain.public.protocol.plan import Group, Member, Plan, group_of, stack_group
from hetrain.secret.verification.job import Verification, kept_rows
from hetrain.train.session import open_base

_SEED = 7
_LAYER = "model.layers.15.self_attn"  # the middle one of 30


@dataclass(frozen=True)
class Workload:
    """One public matrix, and activations that meet it.

    Attributes:
        name: of the shape.
        what: what it is, for readers of results.
        plan: of this one group.
        directory: of the checkpoint that the worker reads.
        matrix: Q, int8 [N, K].
        x: float32 [2048, K], tokens in random order, so that a few of them are a fair sample.
    """

    name: str
    what: str
    plan: Plan
    directory: Path
    matrix: torch.Tensor
    x: torch.Tensor

    @property
    def group(self) -> Group:
        """The plan's only group."""
        return self.plan.groups[0]

    @property
    def verification(self) -> Verification:
        """New rows for both products."""
        return Verification(
            kept_rows(self.group, self.matrix),
            lambda product: self.matrix if product.direction == "forward" else self.matrix.t(),
        )


def random_workload(name: str, k: int, n: int, folder: Path) -> Workload:
    """A Gaussian matrix [n, k] and Gaussian activations."""
    generator = torch.Generator().manual_seed(_SEED)
    directory = folder / name
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "none"}), encoding="utf-8")
    weight = torch.randn(n, k, generator=generator)
    save_file({"weight": weight}, directory / "model.safetensors")
    checkpoint = resolve(str(directory))
    members = (Member(module="linear", tensor="weight", out_features=n),)
    values = stack_group(members, checkpoint.read).values
    plan = Plan(model=checkpoint.label, groups=(group_of(members, values),))
    x = torch.randn(SLOTS, k, generator=generator)
    return Workload(name, "Gaussian", plan, checkpoint.directory, values, x)


def real_workload(name: str) -> Workload:
    """q, k and v of SmolLM2-135M's middle layer, and their input on 4 rows of 512 tokens of running text."""
    base = open_base("smollm2-135m")
    split = split_model(base.files, [f"{_LAYER}.[qkv]_proj"])
    (group,) = split.plan.groups
    x = _activations(base.files, base.tokenizer, group.name) * split.scales[group.name].inputs
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(_SEED))]
    matrix = stack_group(group.members, base.files.read).values
    what = f"SmolLM2-135M, {_LAYER.removeprefix('model.')}, q k v"
    return Workload(name, what, split.plan, base.files.directory, matrix, x)


def _activations(checkpoint: ModelFiles, tokenizer: Any, module: str) -> torch.Tensor:
    """The input of `module` in the stock model, float32 [2048, K]."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    model.get_submodule(module).register_forward_pre_hook(lambda linear, inputs: seen.append(inputs[0]))
    tokens = tokenizer(CORPUS.read_text(encoding="utf-8"))["input_ids"][:SLOTS]
    with torch.no_grad():
        model.base_model(input_ids=torch.tensor(tokens).view(4, -1))
    return seen[0].flatten(0, 1)


WORKLOADS: Mapping[str, Callable[[Path], Workload]] = MappingProxyType(
    {
        "tiny": lambda folder: random_workload("tiny", 32, 96, folder),
        "smollm2": lambda folder: real_workload("smollm2"),
        "llama": lambda folder: random_workload("llama", 2048, 2048, folder),
    }
)
