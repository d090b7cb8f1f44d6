"""This machine, measured for about 20 seconds: a block of the model trained here, and the client's part.

One decoder block of the model's configuration gets weights of no meaning, so nothing is loaded or downloaded.
It is trained as stock transformers and peft would, in fp32, and as the client does, where products come from
nowhere at no cost; their encryption is measured apart. The output head is measured with a part of the
vocabulary, to whose size its cost is proportional. All blocks are taken to cost the same.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from hetrain.inspection.block_probe import ClientBlock, LocalBlock, noise
from hetrain.inspection.crypto_probe import CryptoCosts, measure_crypto
from hetrain.inspection.stopwatch import seconds_per_token
from hetrain.nn.checkpoint_io.loading import skeleton
from hetrain.nn.families import block_linears, shape_of
from hetrain.nn.loss import LocalHead, OutputHead, PullBack, summed_loss
from hetrain.nn.memory.low_precision import StoredHead
from hetrain.public.errors import ModelError
from hetrain.public.lattice.parameters import SLOTS
from hetrain.public.model.files import ModelFiles

BUDGETS_S = {
    "local": 7.0,
    "client": 4.0,
    "weight": 1.5,
    "local head": 2.0,
    "client head": 2.0,
    "softmax": 1.0,
}
"""Elapsed seconds for each measurement; with those of encryption and set-up about 20."""
_HEAD_ROWS = 8192
_SAVED_TOKENS = 512  # of few tokens the client stores less, since it leaves small tensors alone
_SPARE_BYTES = 1 << 30


@dataclass(frozen=True)
class Probe:
    """This machine, in processor seconds and bytes for a token.

    Attributes:
        layers: decoder blocks of the model.
        block_weights: numbers in the matrices of one.
        local_block_s: local training of a block, both passes.
        client_block_s: the client's part of one without products.
        weight_s: a weight of a linear that stays on the client, both passes.
        local_head_s: output head and loss, locally.
        client_head_s: the same on the client.
        client_softmax_s: the client's part of an outsourced output head, without products.
        local_saved: bytes of activations that a block keeps for its backward pass, locally.
        client_saved: the same on the client.
        crypto: of values and bytes.
    """

    layers: int
    block_weights: int
    local_block_s: float
    client_block_s: float
    weight_s: float
    local_head_s: float
    client_head_s: float
    client_softmax_s: float
    local_saved: float
    client_saved: float
    crypto: CryptoCosts


def probe(files: ModelFiles, row_tokens: int, most_tokens: int) -> Probe:
    """Measures this machine.

    Args:
        files: the model; of it only the configuration is read.
        row_tokens: tokens of a row, on which attention depends.
        most_tokens: of a micro-batch.

    Raises:
        ModelError: the model's configuration cannot be used, or this machine lacks memory for one block.
    """
    try:
        return _probe(files, row_tokens, most_tokens)
    # A model that a job can train may still take its inputs in a way that is not tried here.
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"a block cannot be trained by itself: {type(error).__name__}: {error}",
            where="the probe of this machine",
            hint="plan without it",
        ) from error


def _probe(files: ModelFiles, row_tokens: int, most_tokens: int) -> Probe:
    config = skeleton(files).config.get_text_config()
    shapes = [shape_of(linear) for linear in block_linears(skeleton(files, 1)).values()]
    weights = sum(k * n for k, n in shapes)
    _require_memory(weights, most_tokens * 4 * sum(k + 2 * n for k, n in shapes))
    rows = min(row_tokens, most_tokens, getattr(config, "max_position_embeddings", None) or most_tokens)
    local = LocalBlock(files, rows)
    local_s = seconds_per_token(local.step, most_tokens, BUDGETS_S["local"])
    client = ClientBlock(files, rows)
    client_s = seconds_per_token(client.step, most_tokens, BUDGETS_S["client"])
    local_head_s, client_head_s, client_softmax_s = _heads(local.causal, most_tokens)
    return Probe(
        layers=config.num_hidden_layers,
        block_weights=weights,
        local_block_s=local_s,
        client_block_s=client_s,
        weight_s=_weight_seconds(max(shapes, key=math.prod), most_tokens),
        local_head_s=local_head_s,
        client_head_s=client_head_s,
        client_softmax_s=client_softmax_s,
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


def _weight_seconds(shape: tuple[int, int], most_tokens: int) -> float:
    """Processor seconds of a weight and a token in a product and that of its gradient."""
    k, n = shape
    weight = noise((n, k))

    def step(tokens: int) -> None:
        (noise((tokens, k)) @ weight.t()) @ weight

    return seconds_per_token(step, most_tokens, BUDGETS_S["weight"]) / (k * n)


class _LogitsFromNowhere:
    """Logits of no meaning for nothing: a `hetrain.nn.loss.Projection`."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    most_tokens = SLOTS

    def __call__(self, hidden: torch.Tensor) -> tuple[Iterator[torch.Tensor], PullBack]:
        def pull_back(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
            (_,) = gradients
            return torch.zeros_like(hidden)

        return iter([noise((len(hidden), self._vocabulary))]), pull_back


def _heads(causal: PreTrainedModel, most_tokens: int) -> tuple[float, float, float]:
    """Processor seconds for a supervised token: head and loss locally, on the client, and the loss alone."""
    config = causal.config.get_text_config()
    rows, width = min(config.vocab_size, _HEAD_ROWS), causal.get_output_embeddings().weight.shape[1]
    weight = nn.Parameter(noise((rows, width)), requires_grad=False)
    stored = StoredHead(width, 1, bias=False)
    dtype = config.dtype if config.dtype in (torch.bfloat16, torch.float16) else torch.float32
    stored.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    head, softmax = OutputHead(LocalHead(stored)), OutputHead(_LogitsFromNowhere(rows))

    def local(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(hidden @ weight.t(), targets)

    def client(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return summed_loss(hidden, targets, head)

    def alone(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return summed_loss(hidden, targets, softmax)

    def step(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], tokens: int) -> None:
        hidden = noise((tokens, width)).requires_grad_()
        loss(hidden, torch.arange(tokens) % rows).backward()

    scale = config.vocab_size / rows
    return (
        scale * seconds_per_token(lambda tokens: step(local, tokens), most_tokens, BUDGETS_S["local head"]),
        scale * seconds_per_token(lambda tokens: step(client, tokens), most_tokens, BUDGETS_S["client head"]),
        scale * seconds_per_token(lambda tokens: step(alone, tokens), most_tokens, BUDGETS_S["softmax"]),
    )
