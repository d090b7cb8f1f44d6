"""What is known of single model families: a new one goes here.

Everything else follows from transformers' own modules, and a trial run (`hetrain.nn.trial_run`) checks it. A
family may need an entry for how its linears store their matrices, which of its layers attention computes
faithfully, how it makes logits of hidden states, or why it cannot be split. Its norms and MLPs need one to be
computed in fewer passes over memory (`hetrain.nn.fused`). A tiny configuration of it in
`FAMILIES` of tests/harness/split_model.py has it compared with stock transformers and peft.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import GELUTanh, SiLUActivation
from transformers.pytorch_utils import Conv1D

from hetrain.public.errors import UnsupportedArchitecture

Linear: TypeAlias = nn.Linear | Conv1D
"""GPT-2 and GPT-BigCode have a `Conv1D`, which stores its matrix as [in, out]."""

Activation: TypeAlias = Literal["silu", "gelu"]
"""Of gates; GELU is the approximation by tanh."""

OWN_ATTENTION = "its attention does not use transformers' attention interface, so packed rows would meet"
"""Why Falcon, GPT-J, CodeGen and BLOOM are refused."""

# Layers that `row_attention` computes. On the few tokens of a trial others (Llama 4's) may look like these.
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_BLOCK_HINT = "mixtures of experts, convolutions and state-space blocks cannot be split yet"


@dataclass(frozen=True)
class RmsNorm:
    """A norm (w + offset)∘x/sqrt(mean(x²) + epsilon).

    Attributes:
        epsilon: the module's attribute that holds it.
        offset: what is added to the weight.
    """

    epsilon: str = "variance_epsilon"
    offset: float = 0.0


@dataclass(frozen=True)
class GatedMlp:
    """An MLP down_proj(act(g)∘u).

    Attributes:
        activation: act.
        stacked: whether g and u are the halves of ``gate_up_proj(x)`` rather than ``gate_proj(x)`` and
            ``up_proj(x)``.
    """

    activation: Activation
    stacked: bool


_GEMMA_NORM = RmsNorm("eps", offset=1.0)
_NORMS = {
    "LlamaRMSNorm": RmsNorm(),
    "MistralRMSNorm": RmsNorm(),
    "MinistralRMSNorm": RmsNorm(),
    "Qwen2RMSNorm": RmsNorm(),
    "Qwen3RMSNorm": RmsNorm(),
    "Phi3RMSNorm": RmsNorm(),
    "GraniteRMSNorm": RmsNorm(),
    "SmolLM3RMSNorm": RmsNorm(),
    "Glm4RMSNorm": RmsNorm(),
    "Exaone4RMSNorm": RmsNorm(),
    "DeepseekV3RMSNorm": RmsNorm(),
    "Olmo2RMSNorm": RmsNorm(),
    "Olmo3RMSNorm": RmsNorm(),
    "GemmaRMSNorm": _GEMMA_NORM,
    "Gemma2RMSNorm": _GEMMA_NORM,
    "Gemma3RMSNorm": _GEMMA_NORM,
}
_SEPARATE_MLPS = frozenset(
    {
        "LlamaMLP",
        "MistralMLP",
        "MinistralMLP",
        "Qwen2MLP",
        "Qwen3MLP",
        "GraniteMLP",
        "SmolLM3MLP",
        "Exaone4MLP",
        "DeepseekV3MLP",
        "Olmo2MLP",
        "Olmo3MLP",
        "CohereMLP",
        "GemmaMLP",
        "Gemma2MLP",
        "Gemma3MLP",
    }
)
_STACKED_MLPS = frozenset({"Phi3MLP", "Glm4MLP"})


def rms_norm_of(module: nn.Module) -> RmsNorm | None:
    """What norm the module computes; None if that is not known."""
    return _NORMS.get(_name_in_transformers(module))


def gated_mlp(module: nn.Module) -> GatedMlp | None:
    """What gated MLP the module computes; None if that is not known."""
    name = _name_in_transformers(module)
    if name not in _SEPARATE_MLPS | _STACKED_MLPS:
        return None
    stacked = name in _STACKED_MLPS
    activation = module.activation_fn if stacked else module.act_fn
    if isinstance(activation, SiLUActivation | nn.SiLU):
        return GatedMlp("silu", stacked)
    return GatedMlp("gelu", stacked) if isinstance(activation, GELUTanh) else None


def _name_in_transformers(module: nn.Module) -> str:
    kind = type(module)
    return kind.__name__ if kind.__module__.startswith("transformers.models.") else ""


def shape_of(linear: Linear) -> tuple[int, int]:
    """Numbers of input and output features."""
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    return linear.in_features, linear.out_features


def is_transposed(linear: Linear) -> bool:
    """Whether the matrix is stored as [in, out]."""
    return isinstance(linear, Conv1D)


def logit_scale_and_cap(config: PretrainedConfig) -> tuple[float, float | None]:
    """scale and cap, if any, of logits z = scale·projection(hidden), capped to cap·tanh(z/cap)."""
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale = scale / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
    return scale, getattr(config, "final_logit_softcapping", None)  # Gemma 2


def decoder_blocks(causal: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the decoder's blocks: the entries of its outermost module lists."""
    prefix = next(name for name, module in causal.named_modules() if module is causal.base_model)
    lists: list[str] = []
    for name, module in causal.base_model.named_modules(prefix=prefix):
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(f"{outer}." for outer in lists)):
            lists.append(name)
            for index, block in module.named_children():
                yield f"{name}.{index}", block


def block_linears(causal: PreTrainedModel) -> dict[str, Linear]:
    """The linears inside the decoder's blocks, by name.

    Raises:
        UnsupportedArchitecture: a block holds a matrix in any other form, or there is no linear.
    """
    found: dict[str, Linear] = {}
    for block_name, block in decoder_blocks(causal):
        for name, module in block.named_modules(prefix=block_name):
            if isinstance(module, Linear):
                _require_plain_product(name, module)
                found[name] = module
            else:
                _require_no_matrix(name, module)
    if not found:
        raise UnsupportedArchitecture(
            "no nn.Linear or Conv1D inside a list of decoder blocks", where=type(causal).__name__
        )
    for index, kind in enumerate(getattr(causal.config, "layer_types", None) or ()):
        if kind not in _LAYER_TYPES:
            raise UnsupportedArchitecture(
                f"layer {index} is of type {kind!r}", where=type(causal.base_model).__name__, hint=_BLOCK_HINT
            )
    return found


def output_head(causal: PreTrainedModel) -> tuple[str, nn.Linear] | None:
    """Name and module of the projection to logits; None where it is no plain linear."""
    head = causal.get_output_embeddings()
    if type(head) is not nn.Linear:
        return None
    return next(name for name, module in causal.named_modules() if module is head), head


def _require_plain_product(name: str, module: nn.Module) -> None:
    if type(module).forward not in (nn.Linear.forward, Conv1D.forward):
        raise UnsupportedArchitecture(
            f"{type(module).__name__} computes its product in its own way", where=name
        )


def _require_no_matrix(name: str, module: nn.Module) -> None:
    # Cohere's norms have one row per attention head.
    if isinstance(module, nn.Embedding) or "Norm" in type(module).__name__:
        return
    for parameter_name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() >= 2:
            raise UnsupportedArchitecture(
                f"parameter {parameter_name!r} of shape {tuple(parameter.shape)} "
                f"in a {type(module).__name__} is neither an nn.Linear nor a Conv1D",
                where=name,
                hint=_BLOCK_HINT,
            )
