"""An adapter as llama.cpp reads it: one GGUF file with A and B of every matrix.

y += (alpha / r)·B·A·x with ``adapter.lora.alpha`` and r = the columns of B; A is [r, in], B is [out, r].
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from hetrain.export.check import held_out_rows, mean_loss
from hetrain.export.gguf_names import TensorLayout
from hetrain.export.loading import AdapterSource, adapter_tensors, load_adapted, load_base, open_adapter
from hetrain.export.merge import Export
from hetrain.public.errors import ModelError, UsageError
from hetrain.public.protocol.messages import printable

_PREFIX = "base_model.model."
_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class LoraPair:
    """The adapter of one linear: W += scale·B·A, with A [r, in] and B [out, r]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def delta(self) -> torch.Tensor:
        """scale·B·A."""
        return self.scale * (self.b @ self.a)


def export_gguf(adapter: Path, output: Path, model: str | None, check: Path | None, device: str) -> Export:
    """Writes the adapter in float32, and checks the file, read back, before it gets its name.

    Every matrix of the file must be that of the adapter, and the loss of the base model to which the file's
    matrices are added that of the adapted model.

    Args:
        adapter: see `open_adapter`.
        output: a file that does not exist yet.
        model: see `open_adapter`.
        check: see `merge`.
        device: torch device to compute on.

    Raises:
        UsageError: `output` is there already or cannot be written, there is no adapter, or it is more than
            A and B of linears.
        UnsupportedArchitecture: the base model's layout in llama.cpp is not known.
        ModelError: the base model cannot be loaded, or the file is not the adapter.
        DatasetError: the rows of `check` cannot be read.
    """
    if output.exists():
        raise UsageError("is there already", where=str(output), hint="choose a new file")
    source = open_adapter(adapter, model)
    held_out = held_out_rows(check, adapter, source.tokenizer())
    adapted = load_adapted(source, device)
    layout = TensorLayout(adapted.config.get_text_config())
    pairs = pairs_of(adapted)
    _require_pairs_alone(source, pairs)
    trained = mean_loss(adapted, held_out.rows, device)
    del adapted
    scratch = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{output.name}-", dir=output.parent)
        os.close(handle)
        scratch = Path(name)
        write_pairs(scratch, pairs, layout)
        read = read_pairs(scratch, list(pairs), layout)
        _require_same(pairs, read)
        base = load_base(source.base, device)  # afresh: peft may have changed more than the file holds
        _add_to_base(base, read)
        exported = mean_loss(base, held_out.rows, device)
        result = held_out.compare(trained, exported, "float32")
        scratch.chmod(0o644)
        os.replace(scratch, output)
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", where=str(output)) from error
    finally:
        if scratch is not None:
            scratch.unlink(missing_ok=True)
    return Export(output, "float32", result)


def pairs_of(adapted: PeftModel) -> dict[str, LoraPair]:
    """The adapter's matrices by the name of their linear in the base model."""
    pairs = {}
    for name, module in adapted.named_modules():
        if isinstance(module, PeftLinear):
            (active,) = module.active_adapters
            pairs[name.removeprefix(_PREFIX)] = LoraPair(
                module.lora_A[active].weight.detach().float().cpu(),
                module.lora_B[active].weight.detach().float().cpu(),
                float(module.scaling[active]),
            )
    return pairs


def write_pairs(path: Path, pairs: Mapping[str, LoraPair], layout: TensorLayout) -> None:
    """Writes a LoRA GGUF. The file has one alpha for all: where ranks or scales differ, B takes the rest."""
    first = next(iter(pairs.values()))
    alpha = first.scale * len(first.a)
    writer = gguf.GGUFWriter(path, layout.architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for module, pair in pairs.items():
        b = layout.rows_to_gguf(module, pair.b) * (pair.scale * len(pair.a) / alpha)
        name = layout.name(module)
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(pair.a.numpy()))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_pairs(path: Path, modules: Sequence[str], layout: TensorLayout) -> dict[str, LoraPair]:
    """The matrices of a LoRA GGUF for these linears, rows in transformers' order.

    Raises:
        ModelError: one is missing, or the file is no adapter of this architecture.
    """
    try:
        return _read_pairs(path, modules, layout)
    except (LookupError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # gguf checks little
        raise ModelError(
            f"the file is no whole GGUF ({type(error).__name__}: {printable(error)})", where=str(path)
        ) from error


class _Reader(gguf.GGUFReader):  # type: ignore[misc,unused-ignore]
    """Ends with the file. By itself gguf goes on after it, for as many items as a damaged length says."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        found = super()._get(offset, dtype, count, override_order)
        if len(found) < count:
            raise ValueError("it ends early")
        return found


def _read_pairs(path: Path, modules: Sequence[str], layout: TensorLayout) -> dict[str, LoraPair]:
    reader = _Reader(path)
    kind, architecture = (
        reader.fields[key].contents() for key in (gguf.Keys.General.TYPE, gguf.Keys.General.ARCHITECTURE)
    )
    if kind != gguf.GGUFType.ADAPTER or architecture != layout.architecture.name:
        raise ModelError(f"the file is a {printable(kind)} of {printable(architecture)}", where=str(path))
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    pairs = {}
    for module in modules:
        name = layout.name(module)
        try:
            a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        except KeyError as error:
            raise ModelError(f"the file has no tensor {error}", where=str(path)) from error
        pairs[module] = LoraPair(a, layout.rows_from_gguf(module, b), alpha / b.shape[1])
    return pairs


def _require_pairs_alone(source: AdapterSource, modules: Collection[str]) -> None:
    """Biases, magnitudes of DoRA, embeddings and whole modules have no place in the file."""
    sides = {f"{_PREFIX}{module}.lora_{side}.weight" for module in modules for side in "AB"}
    others = sorted(set(adapter_tensors(source)) - sides)
    if others or not modules:
        what = f"holds {others[0]}, for which" if others else "has no A and B of a linear, and for others"
        raise UsageError(
            f"the adapter {what} a LoRA GGUF has no place",
            where=str(source.directory),
            hint="merge the adapter, and convert the directory with llama.cpp's convert_hf_to_gguf.py",
        )


def _require_same(pairs: Mapping[str, LoraPair], read: Mapping[str, LoraPair]) -> None:
    for module, pair in pairs.items():
        wanted, found = pair.delta(), read[module].delta()
        if not torch.allclose(wanted, found, rtol=_TOLERANCE, atol=_TOLERANCE * float(wanted.abs().max())):
            raise ModelError("the file's matrices are not the adapter's; it was not kept", where=module)


@torch.no_grad()
def _add_to_base(base: nn.Module, read: Mapping[str, LoraPair]) -> None:
    for module, pair in read.items():
        weight = base.get_parameter(f"{module}.weight")
        weight.add_(pair.delta().to(weight.device))
