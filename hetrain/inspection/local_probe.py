"""This machine, measured for about 20 seconds: a block of the model trained here, and the client's part.

One decoder block of the model's configuration gets weights of no meaning, so nothing is loaded or downloaded.
It is trained as stock transformers and peft would, in fp32, and as the client does, where products come from
nowhere at no cost; their encryption is measured apart. The output head is measured with a part of the
vocabulary, to whose size its cost is proportional. All blocks are taken to cost the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from hetrain.config import LoraConfig
from hetrain.inspection.crypto_probe import CryptoCosts, measure_crypto
from hetrain.inspection.stopwatch import seconds_per_token
from hetrain.nn.attention import RowLayout, packed_rows
from hetrain.nn.checkpoint_io.loading import skeleton
from hetrain.nn.families import block_linears, is_transposed, shape_of
from hetrain.nn.lora import add_adapter
from hetrain.nn.loss import OutputHead, summed_loss
from hetrain.nn.memory.low_precision import StoredHead
from hetrain.nn.memory.saved_tensors import HalfSaver
from hetrain.nn.remote import RemoteLinear
from hetrain.nn.split import SplitModel
from hetrain.public.errors import ModelError
from hetrain.public.model.files import ModelFiles
from hetrain.public.protocol.plan import Plan

_BUDGETS_S = {"local": 7.0, "client": 5.0, "local head": 3.0, "client head": 3.0}
_HEAD_ROWS = 8192
_SAVED_TOKENS = 512  # of few tokens the client stores less, since it leaves small tensors alone
_SPARE_BYTES = 1 << 30
_NOISE = 1 << 16


@dataclass(frozen=True)
class Probe:
    """This machine, in processor seconds and bytes for a token.

    Attributes:
        layers: decoder blocks of the model.
        block_weights: numbers in the matrices of one.
        local_block_s: local training of a block, both passes.
        client_block_s: the client's part of one without products.
        local_head_s: output head and loss, locally.
        client_head_s: the same on the client.
        local_saved: bytes of activations that a block keeps for its backward pass, locally.
        client_saved: the same on the client.
        crypto: of values and bytes.
    """

    layers: int
    block_weights: int
    local_block_s: float
    client_block_s: float
    local_head_s: float
    client_head_s: float
    local_saved: float
    client_saved: float
    crypto: CryptoCosts

    @property
    def weight_s(self) -> float:
        """Processor seconds of a weight and a token where a linear stays: the difference of both blocks."""
        return max(self.local_block_s - self.client_block_s, 0.0) / self.block_weights


def probe(files: ModelFiles, row_tokens: int, most_tokens: int) -> Probe:
    """Measures this machine.

    Args:
        files: the model; of it only the configuration is read.
        row_tokens: tokens of a row, on which attention depends.
        most_tokens: of a micro-batch.

    Raises:
        ModelError: the model's configuration cannot be used, or this machine lacks memory for one block.
    """
    layers = skeleton(files).config.get_text_config().num_hidden_layers
    shapes = [shape_of(linear) for linear in block_linears(skeleton(files, 1)).values()]
    weights = sum(k * n for k, n in shapes)
    _require_memory(weights, most_tokens * 4 * sum(k + 2 * n for k, n in shapes))
    rows = min(row_tokens, most_tokens)
    local = _LocalBlock(files, rows)
    local_s = seconds_per_token(local.step, most_tokens, _BUDGETS_S["local"])
    client = _ClientBlock(files, rows)
    client_s = seconds_per_token(client.step, most_tokens, _BUDGETS_S["client"])
    local_head_s, client_head_s = _heads(local.causal, most_tokens)
    return Probe(
        layers=layers,
        block_weights=weights,
        local_block_s=local_s,
        client_block_s=client_s,
        local_head_s=local_head_s,
        client_head_s=client_head_s,
        local_saved=local.saved_bytes(min(most_tokens, _SAVED_TOKENS)),
        client_saved=client.saved_bytes(min(most_tokens, _SAVED_TOKENS)),
        crypto=measure_crypto(),
    )


def free_memory() -> int:
    """Bytes that this machine can still give to a process; all that it has where it does not say."""
    try:
        with open("/proc/meminfo") as file:
            (line,) = (line for line in file if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _require_memory(weights: int, activations: int) -> None:
    needed, free = 4 * weights + activations + _SPARE_BYTES, free_memory()
    if needed > free:
        raise ModelError(
            f"one block takes {needed / 1e9:.1f} GB to measure, and {free / 1e9:.1f} GB are free",
            where="the probe of this machine",
            hint="make room, or plan without it",
        )


class _LocalBlock:
    """A block as stock transformers and peft train it, on rows of equal length in one batch."""

    def __init__(self, files: ModelFiles, row_tokens: int) -> None:
        self.causal = _adapted_block(files, remote=False)
        self.causal.config._attn_implementation = "sdpa"
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


class _ClientBlock:
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
        with packed_rows(RowLayout.of(lengths)), self._saver.saving():
            return _states(self.causal, _embedded(self.causal, 1, tokens), positions)


class _Nowhere:
    """A group whose products cost nothing: see `hetrain.nn.remote.LinearGroup`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        self._widths = in_features, out_features
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def output(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Always the same numbers."""
        if self._kept is None or len(self._kept[0]) != x.shape[-2]:
            self._kept = tuple(_noise((x.shape[-2], width)) for width in self._widths)  # type: ignore[assignment]
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
                setattr(module, name, nn.Parameter(_noise(tuple(parameter.shape)), requires_grad=False))
    causal.requires_grad_(False)
    causal.eval()
    plan = Plan(model="probe", groups=())
    add_adapter(SplitModel(causal, plan, {}, tuple(linears), 0, conv1d), LoraConfig(), seed=0)
    return causal


def _noise(shape: tuple[int, ...]) -> torch.Tensor:
    """Small numbers, quickly: a few random ones again and again."""
    count = torch.Size(shape).numel()
    few = torch.randn(min(_NOISE, count)) * 0.02
    return few.repeat(-(-count // max(len(few), 1)))[:count].view(shape)


def _embedded(causal: PreTrainedModel, rows: int, tokens: int) -> torch.Tensor:
    """Inputs of a block that is not the first: they need a gradient."""
    width = causal.config.get_text_config().hidden_size
    return _noise((rows, tokens, width)).requires_grad_()


def _states(causal: PreTrainedModel, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    output = causal.base_model(inputs_embeds=x, position_ids=positions, use_cache=False, return_dict=True)
    states: torch.Tensor = output.last_hidden_state
    return states


def _heads(causal: PreTrainedModel, most_tokens: int) -> tuple[float, float]:
    """Processor seconds of output head and loss for a supervised token, locally and on the client."""
    config = causal.config.get_text_config()
    rows = min(config.vocab_size, _HEAD_ROWS)
    weight = nn.Parameter(_noise((rows, config.hidden_size)), requires_grad=False)
    stored = StoredHead(config.hidden_size, 1, bias=False)
    dtype = config.dtype if config.dtype in (torch.bfloat16, torch.float16) else torch.float32
    stored.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    head = OutputHead(stored)

    def local(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(hidden @ weight.t(), targets)

    def client(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return summed_loss(hidden, targets, head)

    def step(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], tokens: int) -> None:
        hidden = _noise((tokens, config.hidden_size)).requires_grad_()
        loss(hidden, torch.arange(tokens) % rows).backward()

    scale = config.vocab_size / rows
    return (
        scale * seconds_per_token(lambda tokens: step(local, tokens), most_tokens, _BUDGETS_S["local head"]),
        scale
        * seconds_per_token(lambda tokens: step(client, tokens), most_tokens, _BUDGETS_S["client head"]),
    )
