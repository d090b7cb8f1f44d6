"""Norms and gated activations of the decoder's blocks, each in one pass over memory forward and one backward.

    rms_norm      y = w∘x·r, r = 1/sqrt(mean(x²) + epsilon)
    gated_silu    y = g·sigmoid(g)∘u
    gated_gelu    the same with GELU, approximated by tanh
    exponentials  e^(z − max z) in place, and its sum: what a softmax is made of

The functions take what the compiled kernels can: float32 on the CPU. For anything else, and where nothing was
compiled, they are torch's own operations, which are the reference. `fuse_layers` has a model use them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function
from transformers import PreTrainedModel

from hetrain.nn.families import Activation, GatedMlp, RmsNorm, gated_mlp, rms_norm_of
from hetrain.nn.native.layers_library import NativeLayers


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """w∘x·r with r = 1/sqrt(mean(x²) + epsilon) along the last dimension.

    For its gradient x alone is saved; where the weight needs one too, torch's operations compute it. A
    `TorchFunctionMode` sees the call, as it sees those of torch.

    Args:
        x: [..., width].
        weight: [width].
        epsilon: added to the mean.
    """
    if not _fits(x, weight) or (weight.requires_grad and torch.is_grad_enabled()):
        return reference_rms_norm(x, weight, epsilon)
    if has_torch_function((x, weight)):
        return _seen(rms_norm, x, weight, epsilon)
    y: torch.Tensor = _RmsNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return y


def gated_silu(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """g·sigmoid(g)∘u of two tensors of one shape [..., width]: columns of a wider matrix, for one.

    For their gradients g and u are saved. These are columns, side by side, of one fresh [..., 2·width].
    A `TorchFunctionMode` sees the call, as it sees those of torch.
    """
    if not _fits(g, u) or g.shape != u.shape:
        return reference_gated_silu(g, u)
    return _seen(gated_silu, g, u) if has_torch_function((g, u)) else _gated(g, u, "silu")


def gated_gelu(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """gelu(g)∘u, approximated by tanh; see `gated_silu`."""
    if not _fits(g, u) or g.shape != u.shape:
        return reference_gated_gelu(g, u)
    return _seen(gated_gelu, g, u) if has_torch_function((g, u)) else _gated(g, u, "gelu")


def _gated(g: torch.Tensor, u: torch.Tensor, activation: Activation) -> torch.Tensor:
    y: torch.Tensor = _Gate.apply(g, u, activation)  # type: ignore[no-untyped-call]
    return y


def reference_rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`rms_norm` by torch, the mean in float32."""
    wide = x.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * normed.to(x.dtype)


def reference_gated_silu(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """`gated_silu` by torch."""
    return functional.silu(g) * u


def reference_gated_gelu(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """`gated_gelu` by torch."""
    return functional.gelu(g, approximate="tanh") * u


def exponentials(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces z [rows, width] by e^(z − m), m [rows] its rows' largest values.

    Returns m, and the sums of the new rows. A row that has a NaN, or an infinity, gets a sum that is NaN.
    """
    if _fits(z) and z.stride(1) == 1:
        return _native().exponentials(z)
    return reference_exponentials(z)


def reference_exponentials(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`exponentials` by torch."""
    largest = z.amax(dim=1)
    z.sub_(largest[:, None]).exp_()
    return largest, z.sum(dim=1)


@functools.cache
def layer_kernels() -> NativeLayers | None:
    """The compiled kernels; None where there are none."""
    return NativeLayers.best()


def _fits(*operands: torch.Tensor) -> bool:
    return layer_kernels() is not None and all(
        each.dtype == torch.float32 and each.device.type == "cpu" and each.dim() > 0 and each.numel() > 0
        for each in operands
    )


def _seen(function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """Calls `function` by way of whatever mode there is."""
    tensors = tuple(each for each in arguments if isinstance(each, torch.Tensor))
    result: torch.Tensor = handle_torch_function(function, tensors, *arguments)
    return result


def _native() -> NativeLayers:
    kernels = layer_kernels()
    assert kernels is not None
    return kernels


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as [rows, width], each row contiguous: a view wherever there can be one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


class _RmsNorm(torch.autograd.Function):
    """Saves x as it came, so that one who saves it too shares it; r is computed again."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return _native().rms_norm(_rows(x), weight.contiguous(), epsilon).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        dx = _native().rms_norm_backward(_rows(x), weight.contiguous(), _rows(dy), ctx.epsilon)
        return dx.view(x.shape), None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g: torch.Tensor, u: torch.Tensor, activation: Activation) -> torch.Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(g, u)
        ctx.activation = activation
        return _native().gate(_rows(g), _rows(u), activation).view(g.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # type: ignore[no-untyped-def]
        g, u = ctx.saved_tensors
        both = _native().gate_backward(_rows(g), _rows(u), _rows(dy), ctx.activation)
        dg, du = both.view(*g.shape[:-1], -1).chunk(2, dim=-1)
        return dg, du, None


# ---- Models ----


class _Fused:
    """Of a module whose class was changed for one that computes the same: what its class was."""

    original: type[nn.Module]


class _FusedNorm(_Fused, nn.Module):
    known: RmsNorm
    weight: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight if self.known.offset == 0.0 else self.weight + self.known.offset
        return rms_norm(x, weight, getattr(self, self.known.epsilon))


class _FusedMlp(_Fused, nn.Module):
    known: GatedMlp
    down_proj: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        g, u = self._gate_and_up(x)
        y: torch.Tensor = self.down_proj(GATED[self.known.activation](g, u))
        return y

    def _gate_and_up(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError


class _SeparateMlp(_FusedMlp):
    gate_proj: nn.Module
    up_proj: nn.Module

    def _gate_and_up(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.gate_proj(x), self.up_proj(x)


class _StackedMlp(_FusedMlp):
    gate_up_proj: nn.Module

    def _gate_and_up(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        g, u = self.gate_up_proj(x).chunk(2, dim=-1)
        return g, u


GATED: dict[Activation, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "silu": gated_silu,
    "gelu": gated_gelu,
}


def fuse_layers(causal: PreTrainedModel) -> None:
    """Has the norms and gated MLPs that hetrain knows compute by `rms_norm`, `gated_silu` and `gated_gelu`.

    They stay the same modules, of a subclass of their class, so that names, ties, hooks and copies stay.
    Others keep transformers' own computation.
    """
    classes: dict[tuple[type[nn.Module], object], type[nn.Module]] = {}
    for module in causal.modules():
        known = rms_norm_of(module) or gated_mlp(module)
        if known is not None:
            key = type(module), known
            if key not in classes:
                classes[key] = _fused_class(type(module), known)
            module.__class__ = classes[key]


@contextmanager
def as_in_transformers(causal: PreTrainedModel) -> Iterator[None]:
    """Within this context the modules that `fuse_layers` has changed compute as transformers wrote them."""
    fused = [(module, type(module)) for module in causal.modules() if isinstance(module, _Fused)]
    try:
        for module, kind in fused:
            module.__class__ = kind.original  # type: ignore[assignment]
        yield
    finally:
        for module, kind in fused:
            module.__class__ = kind


def _fused_class(original: type[nn.Module], known: RmsNorm | GatedMlp) -> type[nn.Module]:
    if isinstance(known, RmsNorm):
        mixin: type[nn.Module] = _FusedNorm
    else:
        mixin = _StackedMlp if known.stacked else _SeparateMlp
    attributes = {"original": original, "known": known, "__module__": __name__}
    return type(f"Fused{original.__name__}", (mixin, original), attributes)
