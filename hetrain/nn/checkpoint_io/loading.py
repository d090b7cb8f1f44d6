"""An architecture without weights, and the tensors of it that the client keeps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers import __version__ as _VERSION

from hetrain.nn.attention import IMPLEMENTATION
from hetrain.nn.families import OWN_ATTENTION
from hetrain.nn.memory.low_precision import is_stored, keep_as_stored
from hetrain.public.errors import ModelError, UnsupportedArchitecture
from hetrain.public.model.files import ModelFiles

_ROWS_AT_ONCE = 8192


def skeleton(checkpoint: ModelFiles, layers: int | None = None) -> PreTrainedModel:
    """The checkpoint's architecture in float32 with parameters on the meta device and real buffers.

    Args:
        checkpoint: of which only the configuration is read.
        layers: decoder layers, the first ones; None takes all.

    Raises:
        ModelError: config.json cannot be used.
        UnsupportedArchitecture: it is no decoder that transformers can build with our attention, or the
            checkpoint is quantised already.
    """
    config = _config(checkpoint)
    if layers is not None:
        _shorten(config.get_text_config(), layers)
    try:
        # Buffers (rotary frequencies, for one) are computed for real: no checkpoint has them.
        with init_empty_weights(include_buffers=False):
            causal = AutoModelForCausalLM.from_config(
                config,
                attn_implementation=IMPLEMENTATION,
                dtype=torch.float32,
                trust_remote_code=False,
            )
    except (ValueError, OSError, KeyError, AttributeError, ImportError) as error:
        # Older architectures look their attention up in a table of their own.
        reason = (
            OWN_ATTENTION
            if error.args == (IMPLEMENTATION,)
            else f"transformers {_VERSION} cannot build it: {_first_line(error)}"
        )
        raise UnsupportedArchitecture(
            reason,
            where=", ".join(config.architectures or [type(config).__name__]),
            hint="only decoder-only language models can be split",
        ) from error
    causal.tie_weights()
    return causal


def load_kept(causal: PreTrainedModel, checkpoint: ModelFiles, tensors: Mapping[str, str]) -> None:
    """Loads every parameter that is on the meta device still, frozen, and every buffer that was saved.

    Embeddings and output head keep the type that they are stored in; all others become float32.

    Args:
        causal: from `skeleton`; what is to stay empty is no longer part of it.
        checkpoint: where to read.
        tensors: names there by names in the model, from `tensor_names`.

    Raises:
        ModelError: a tensor is missing, has another shape, or a parameter is not finite.
    """
    keep_as_stored(causal)
    for name, parameter in list(causal.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            module = causal.get_submodule(owner)
            tensor = tensor_of(tensors, checkpoint, name)
            value = _read(checkpoint, tensor, parameter)
            if leaf != "weight" or not is_stored(module) or not value.is_floating_point():
                value = value.to(parameter.dtype)
            if not _is_finite(checkpoint.read(tensor)):
                raise ModelError(
                    "the weights are not finite",
                    where=name,
                    hint="the checkpoint is damaged: download it again",
                )
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    causal.tie_weights()
    for name, buffer in causal.named_buffers():
        if name in tensors:
            buffer.copy_(_read(checkpoint, tensors[name], buffer))


def tensor_of(tensors: Mapping[str, str], checkpoint: ModelFiles, name: str) -> str:
    """The tensor that is parameter `name`. Raises `ModelError` when the checkpoint has none."""
    if name not in tensors:
        raise ModelError(
            f"the checkpoint has no tensor {name}",
            where=str(checkpoint.directory),
            hint="its names differ from those of the architecture in config.json",
        )
    return tensors[name]


def _config(checkpoint: ModelFiles) -> PretrainedConfig:
    where = str(checkpoint.directory / "config.json")
    try:
        config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ModelError(
            f"transformers {_VERSION} cannot use it: {_first_line(error)}", where=where
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedArchitecture(
            "the checkpoint is quantised already",
            where=where,
            hint="give the original weights: bf16, fp16 or fp32",
        )
    return config


def _shorten(config: PretrainedConfig, layers: int) -> None:
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def _is_finite(value: torch.Tensor) -> bool:
    """Whether all values are finite in float32.

    Read the tensor for this alone: pages of a mapped file stay in memory for as long as what was looked at.
    """
    return all(bool(torch.isfinite(rows.to(torch.float32)).all()) for rows in value.split(_ROWS_AT_ONCE))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read(checkpoint: ModelFiles, tensor: str, like: torch.Tensor) -> torch.Tensor:
    value = checkpoint.read(tensor)
    if value.shape != like.shape:
        raise ModelError(
            f"tensor {tensor} has shape {tuple(value.shape)}, the architecture says {tuple(like.shape)}",
            where=str(checkpoint.directory),
        )
    return value
