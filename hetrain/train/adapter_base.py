"""Whether a model is the base model of an adapter."""

from __future__ import annotations

from pathlib import Path

import torch

from hetrain.nn.adapter_files import base_model_of
from hetrain.public.errors import UsageError
from hetrain.public.model.files import ModelFiles, public_name, resolve

_COMPARED = 6
"""Tensors of two directories that are compared: one that was trained differs in nearly all."""


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
        is_other = not Path(given).expanduser().is_dir() and public_name(named) != public_name(given)
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
