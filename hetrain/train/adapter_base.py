"""The base model of an adapter: which one it names, and whether another one is the same."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from hetrain.public.errors import UsageError
from hetrain.public.model.files import ModelFiles, resolve

_COMPARED = 6
"""Tensors of two directories that are compared: one that was trained differs in nearly all."""


def base_model_of(adapter: Path) -> str:
    """The base model that an adapter names. Raises `UsageError` if it names none."""
    try:
        name = json.loads((adapter / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            "no adapter_config.json there that names a base model",
            where=str(adapter),
            hint="give the output directory of a training job, or `model`",
        ) from error
    return str(name)


def require_base(adapter: Path, given: str, files: ModelFiles) -> None:
    """Raises `UsageError` when an adapter belongs to another model than the `given` one, as far as known.

    Another directory may be a copy. Of a base model that is not on this machine only its name is known.
    """
    named = base_model_of(adapter)
    if named == given:
        return
    if Path(named).is_dir():
        is_other = not _are_same(resolve(named), files)
    else:
        is_other = not Path(given).expanduser().is_dir()
    if is_other:
        raise UsageError(
            f"the adapter in {adapter} belongs to {named}, not to {given}",
            field="model",
            hint="leave it out: the adapter names its base model",
        )


def _are_same(one: ModelFiles, other: ModelFiles) -> bool:
    if one.directory.samefile(other.directory):
        return True
    if one.tensors.keys() != other.tensors.keys():
        return False
    names = sorted(one.tensors)
    return all(
        torch.equal(one.read(name), other.read(name)) for name in names[:: -(-len(names) // _COMPARED)]
    )
