"""One decoder block of a model's configuration with weights of no meaning, trained in two ways."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from hetrain.config import LoraConfig
from hetrain.nn.attention import RowLayout, end_to_end, packed_rows
from hetrain.nn.checkpoint_io.loading import skeleton
from hetrain.nn.families import block_linears, is_transposed, shape_of
from hetrain.nn.lora import add_adapter
from hetrain.nn.memory.saved_tensors import HalfSaver
from hetrain.nn.remote import RemoteLinear
from hetrain.nn.split import SplitModel
from hetrain.public.model.files import ModelFiles
from hetrain.public.protocol.plan import Plan

_FEW = 1 << 16


class LocalBlock:
    """A block as stock transformers and peft train it, on rows of equal length in one batch."""

    def __init__(self, files: ModelFiles, row_tokens: int) -> None:
        self.causal = _adapted_block(files, remote=False)
        # Of the two stock implementations the faster one, which cannot cap scores as Gemma 2 does.
        capped = getattr(self.causal.config.get_text_config(), "attn_logit_softcapping", None)
        self.causal.config._attn_implementation = "eager" if capped else "sdpa"
        self._row_tokens = row_tokens

    def step(self, tokens: int) -> None:
        """Both passes over so many tokens."""
        states = self._forward(tokens)
        states.backward(torch.ones_like(states))

    def saved_bytes(self, tokens: int) -> float:
        """What a forward pass keeps, for a token: every storage once, parameters not counted."""
        parameters = {each.untyped_storage().data_ptr() for each in self.causal.parameters()}
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            states = self._forward(tokens)
        del states
        return sum(saved.values()) / tokens

    def _forward(self, tokens: int) -> torch.Tensor:
        row = min(self._row_tokens, tokens)
        return _states(self.causal, _embedded(self.causal, max(tokens // row, 1), row))


class ClientBlock:
    """A block as the client trains it, on packed rows, with its products for nothing."""

    def __init__(self, files: ModelFiles, row_tokens: int) -> None:
        self.causal = _adapted_block(files, remote=True)
        self._saver = HalfSaver(self.causal.parameters())
        self._row_tokens = row_tokens

    def step(self, tokens: int) -> None:
        """Both passes over so many tokens."""
        states = self._forward(tokens)
        states.backward(torch.ones_like(states))

    def saved_bytes(self, tokens: int) -> float:
        """What a forward pass keeps, for a token, in float16."""
        self._forward(tokens)
        return 2 * self._saver.stored_values / tokens

    def _forward(self, tokens: int) -> torch.Tensor:
        row = min(self._row_tokens, tokens)
        lengths = [row] * (tokens // row) + ([tokens % row] if tokens % row else [])
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        with packed_rows(RowLayout.of(end_to_end(lengths))), self._saver.saving():
            return _states(self.causal, _embedded(self.causal, 1, tokens), positions)


class _Nowhere:
    """A group whose products cost nothing: see `hetrain.nn.remote.LinearGroup`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        self._widths = in_features, out_features
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def output(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Always the same numbers."""
        if self._kept is None or len(self._kept[0]) != x.shape[-2]:
            self._kept = tuple(noise((x.shape[-2], width)) for width in self._widths)  # type: ignore[assignment]
        y: torch.Tensor = _FreeProduct.apply(x, self._kept)  # type: ignore[no-untyped-call]
        return y


class _FreeProduct(torch.autograd.Function):
    """Has the shapes and the gradients of x·Wᵀ, and no product."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, kept: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:  # type: ignore[no-untyped-def]
        ctx.dx = kept[0].view_as(x)
        return kept[1].view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[no-untyped-def]
        return ctx.dx, None


def _adapted_block(files: ModelFiles, *, remote: bool) -> PreTrainedModel:
    """A decoder of one block with a fresh adapter. Embeddings and output head stay without memory."""
    causal = skeleton(files, 1)
    linears = block_linears(causal)
    conv1d = any(map(is_transposed, linears.values()))
    if remote:
        for name, linear in linears.items():
            shape, (parent, _, leaf) = shape_of(linear), name.rpartition(".")
            replaced = RemoteLinear(*shape, linear.bias)
            replaced.group = _Nowhere(*shape)
            setattr(causal.get_submodule(parent), leaf, replaced)
    left_out = {id(module) for module in (causal.get_input_embeddings(), causal.get_output_embeddings())}
    for module in causal.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and id(module) not in left_out:
                setattr(module, name, nn.Parameter(noise(tuple(parameter.shape)), requires_grad=False))
    causal.requires_grad_(False)
    causal.eval()
    plan = Plan(model="probe", groups=())
    add_adapter(SplitModel(causal, plan, {}, (), tuple(linears), 0, conv1d), LoraConfig(), seed=0)
    return causal


def noise(shape: tuple[int, ...]) -> torch.Tensor:
    """Small numbers, quickly: a few random ones again and again."""
    count = torch.Size(shape).numel()
    few = torch.randn(min(_FEW, count)) * 0.02
    return few.repeat(-(-count // max(len(few), 1)))[:count].view(shape)


def _embedded(causal: PreTrainedModel, rows: int, tokens: int) -> torch.Tensor:
    """Inputs of a block that is not the first: they need a gradient."""
    width = causal.get_input_embeddings().weight.shape[1]
    return noise((rows, tokens, width)).requires_grad_()


def _states(causal: PreTrainedModel, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    output = causal.base_model(inputs_embeds=x, position_ids=positions, use_cache=False, return_dict=True)
    states: torch.Tensor = output.last_hidden_state
    return states
