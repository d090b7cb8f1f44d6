"""What llama.cpp calls the matrices of an architecture, and in which order it keeps their rows.

As convert_hf_to_gguf.py and convert_lora_to_gguf.py of llama.cpp: architectures that descend from its
LlamaModel have the rows of the query and key projections interleaved for each head, since its rotary
embedding pairs neighbours where transformers pairs halves. In an adapter B has those rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import gguf
import torch
from transformers import PretrainedConfig

from hetrain.public.errors import UnsupportedArchitecture

_Arch = gguf.MODEL_ARCH


@dataclass(frozen=True)
class Architecture:
    """llama.cpp's architecture for a model type of transformers, and whether it interleaves q and k."""

    arch: gguf.MODEL_ARCH
    interleaves: bool = False

    @property
    def name(self) -> str:
        """As ``general.architecture`` has it."""
        return str(gguf.MODEL_ARCH_NAMES[self.arch])


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture(_Arch.LLAMA, interleaves=True),
        "mistral": Architecture(_Arch.LLAMA, interleaves=True),
        "smollm3": Architecture(_Arch.SMOLLM3, interleaves=True),
        "granite": Architecture(_Arch.GRANITE, interleaves=True),
        "qwen2": Architecture(_Arch.QWEN2),
        "qwen3": Architecture(_Arch.QWEN3),
        "gemma": Architecture(_Arch.GEMMA),
        "gemma2": Architecture(_Arch.GEMMA2),
        "gemma3_text": Architecture(_Arch.GEMMA3),
        "phi3": Architecture(_Arch.PHI3),
        "starcoder2": Architecture(_Arch.STARCODER2),
    }
)


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The architecture of a model. Raises `UnsupportedArchitecture` when its layout is not known here."""
    if config.model_type not in ARCHITECTURES:
        raise UnsupportedArchitecture(
            "its layout in llama.cpp is not known here",
            where=config.model_type,
            hint="merge the adapter, and convert the directory with llama.cpp's convert_hf_to_gguf.py. Known "
            f"are {', '.join(ARCHITECTURES)}",
        )
    return ARCHITECTURES[config.model_type]


class TensorLayout:
    """Names and row orders of one model's matrices.

    Args:
        config: the model's.

    Raises:
        UnsupportedArchitecture: see `architecture_of`.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self.architecture = architecture_of(config)
        self._names = gguf.get_tensor_name_map(self.architecture.arch, config.num_hidden_layers)
        self._heads = {
            "q_proj": config.num_attention_heads,
            "k_proj": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        }

    def name(self, module: str) -> str:
        """llama.cpp's name of a linear's matrix, as ``blk.0.attn_q.weight``.

        Raises:
            UnsupportedArchitecture: it has none.
        """
        name = self._names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name is None:
            raise UnsupportedArchitecture("llama.cpp has no name for this matrix", where=module)
        return str(name)

    def rows_to_gguf(self, module: str, matrix: torch.Tensor) -> torch.Tensor:
        """The rows of a linear's W or B in llama.cpp's order."""
        heads = self._interleaved_heads(module)
        if heads is None:
            return matrix
        return matrix.view(heads, 2, -1, matrix.shape[1]).transpose(1, 2).reshape(matrix.shape)

    def rows_from_gguf(self, module: str, matrix: torch.Tensor) -> torch.Tensor:
        """The inverse of `rows_to_gguf`."""
        heads = self._interleaved_heads(module)
        if heads is None:
            return matrix
        return matrix.view(heads, -1, 2, matrix.shape[1]).transpose(1, 2).reshape(matrix.shape)

    def _interleaved_heads(self, module: str) -> int | None:
        return self._heads.get(module.rpartition(".")[2]) if self.architecture.interleaves else None
