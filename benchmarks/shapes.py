"""Shapes of public models: their linears as a worker meets them, and a whole model with random weights."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hetrain.public.errors import ModelError
from hetrain.public.model.files import cache_directory, resolve

SMOLLM2, LLAMA, LLAMA_70B_SLICE = "smollm2-135m", "llama-3.2-1b", "llama-3.1-70b-2-layers"
LLAMA_8B_LAYERS = 32
LLAMA_8B_SLICES: Mapping[str, int] = MappingProxyType({f"llama-3.1-8b-{n}-layers": n for n in (2, 4)})
"""Slices of Llama-3.1-8B, and how many of its 32 layers they have."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_SEED, _STD = 7, 0.02


@dataclass(frozen=True)
class Linears:
    """Linears of one decoder block that share an input, as one matrix [n, k]."""

    name: str
    k: int
    n: int


GROUPS: Mapping[str, tuple[Linears, ...]] = MappingProxyType(
    {
        "gpt2": (
            Linears("attn.c_attn", 768, 2304),
            Linears("attn.c_proj", 768, 768),
            Linears("mlp.c_fc", 768, 3072),
            Linears("mlp.c_proj", 3072, 768),
        ),
        SMOLLM2: (
            Linears("q k v", 576, 960),
            Linears("o", 576, 576),
            Linears("gate up", 576, 3072),
            Linears("down", 1536, 576),
        ),
        LLAMA: (
            Linears("q k v", 2048, 3072),
            Linears("o", 2048, 2048),
            Linears("gate up", 2048, 16384),
            Linears("down", 8192, 2048),
        ),
    }
)


def llama_3_2_1b() -> LlamaConfig:
    """The public configuration of Llama-3.2-1B, but with SmolLM2's ids of beginning and end."""
    return _llama_3(
        rope_factor=32.0,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        head_dim=64,
        tie_word_embeddings=True,
    )


def llama_3_1_8b_slice(layers: int) -> LlamaConfig:
    """The public configuration of Llama-3.1-8B with `layers` of its layers, and ids as in `llama_3_2_1b`."""
    return _llama_3(
        rope_factor=8.0,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        head_dim=128,
        tie_word_embeddings=False,
    )


def llama_3_1_70b_slice() -> LlamaConfig:
    """The public configuration of Llama-3.1-70B with 2 of its 80 layers, and ids as in `llama_3_2_1b`."""
    return _llama_3(
        rope_factor=8.0,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=2,
        num_attention_heads=64,
        head_dim=128,
        tie_word_embeddings=False,
    )


def _llama_3(*, rope_factor: float, **shape: Any) -> LlamaConfig:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": rope_factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return LlamaConfig(
        vocab_size=128256,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        bos_token_id=1,
        eos_token_id=2,
        **shape,
    )


def random_checkpoint(name: str, config: LlamaConfig) -> str:
    """A checkpoint of that shape in the cache directory, made on first use, whole or not at all."""
    target = cache_directory() / f"random-{name}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            try:
                write_random_llama(scratch, config)
                copy_tokenizer(scratch)
                scratch.chmod(0o755)
                scratch.rename(target)
            except (OSError, SafetensorError) as error:
                raise ModelError(
                    f"the random model cannot be written: {error}",
                    where=str(target),
                    hint="it takes two bytes a parameter: make room, or set HETRAIN_CACHE",
                ) from error
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return str(target)


MODELS: Mapping[str, Callable[[], str]] = MappingProxyType(
    {
        SMOLLM2: lambda: SMOLLM2,
        LLAMA: lambda: random_checkpoint(LLAMA, llama_3_2_1b()),
        **{
            name: lambda name=name, n=n: random_checkpoint(name, llama_3_1_8b_slice(n))  # type: ignore[misc]
            for name, n in LLAMA_8B_SLICES.items()
        },
        LLAMA_70B_SLICE: lambda: random_checkpoint(LLAMA_70B_SLICE, llama_3_1_70b_slice()),
    }
)
"""The value of `--model-name-or-path` for a model of each shape."""


def write_random_llama(directory: Path, config: LlamaConfig) -> None:
    """A bfloat16 checkpoint of this shape, one file after the other: embeddings, each block, the last norm.

    Matrices are Gaussian with standard deviation 0.02, as before training, and norms are one: activations
    stay finite. The same configuration gives the same weights.
    """
    config.architectures, config.dtype = [LlamaForCausalLM.__name__], "bfloat16"
    config.save_pretrained(directory)
    generator = torch.Generator().manual_seed(_SEED)
    weight_map: dict[str, str] = {}
    for part, shapes in groupby(_parameters(config), key=lambda parameter: _part(parameter[0])):
        tensors = {name: _draw(shape, generator) for name, shape in shapes}
        file = f"{part}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def copy_tokenizer(directory: Path) -> None:
    """SmolLM2's tokenizer, whose ids are below 49152."""
    source = resolve(SMOLLM2).directory
    for name in _TOKENIZER_FILES:
        shutil.copy(source / name, directory)


def _parameters(config: LlamaConfig) -> Iterator[tuple[str, torch.Size]]:
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if not (config.tie_word_embeddings and name == "lm_head.weight"):
            yield name, parameter.shape


def _part(name: str) -> str:
    """``model.layers.3`` of everything in that block, the module's name of anything else."""
    block = name.split(".")[:3]
    return ".".join(block) if block[1] == "layers" else name.rpartition(".")[0]


def _draw(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=_STD, generator=generator)
