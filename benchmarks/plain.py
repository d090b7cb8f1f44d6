"""The yardstick: the same LoRA step with stock transformers and peft, in clear, in fp32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import peft
import torch
from peft import PeftModel
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from hetrain.config import LoraConfig
from hetrain.data.packing import MicroBatch
from hetrain.nn.lora import adapter_parameters

_LEAN_BATCHES = 4


def plain_model(
    directory: Path,
    lora: LoraConfig,
    values: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> PeftModel:
    """Stock peft on the stock model; `values` sets the adapter's parameters by name."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    numbers = lora.layer_numbers
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear" if numbers is None else _block_linears(model),
        layers_to_transform=None if numbers is None else list(numbers),
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, config)
    if values is not None:
        with torch.no_grad():
            for name, parameter in adapter_parameters(adapted).items():
                parameter.copy_(values[name])
    return cast(PeftModel, adapted)


def _block_linears(model: nn.Module) -> list[str]:
    """Names of the decoder blocks' linears: peft takes no ``all-linear`` for some of the layers."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return sorted({name.rpartition(".")[2] for name in linears if ".layers." in name})


def plain_step(model: nn.Module, batch: MicroBatch) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss over the targets of `batch` and the gradients of its sum, rows as a right-padded batch."""
    rows, wanted = _rows(batch)
    tokens, targets = _padded(rows, 0), _padded(wanted, -100)
    mask = _padded([torch.ones_like(row) for row in rows], 0)
    logits = model(input_ids=tokens, attention_mask=mask).logits
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
    loss.backward()
    return float(loss.detach()) / batch.n_targets, _take_gradients(model)


def lean_step(model: PeftModel, batch: MicroBatch) -> tuple[float, dict[str, torch.Tensor]]:
    """As `plain_step` with less work: rows in batches of similar length, and logits of targets alone."""
    causal = model.get_base_model()
    rows = sorted(zip(*_rows(batch), strict=True), key=lambda row: len(row[0]))
    size, total = -(-len(rows) // _LEAN_BATCHES), 0.0
    for first in range(0, len(rows), size):
        tokens, targets = zip(*rows[first : first + size], strict=True)
        padded, wanted = _padded(tokens, 0), _padded(targets, -100)
        mask = _padded([torch.ones_like(row) for row in tokens], 0)
        states = causal.base_model(input_ids=padded, attention_mask=mask).last_hidden_state
        counts = wanted != -100
        logits = causal.get_output_embeddings()(states[counts])
        loss = cross_entropy(logits, wanted[counts], reduction="sum")
        loss.backward()
        total += float(loss.detach())
    return total / batch.n_targets, _take_gradients(model)


def _take_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    gradients = {}
    for name, parameter in adapter_parameters(model).items():
        assert parameter.grad is not None
        gradients[name] = parameter.grad
        parameter.grad = None
    return gradients


def _rows(batch: MicroBatch) -> tuple[list[torch.Tensor], Sequence[torch.Tensor]]:
    """Tokens and targets of each row, of which none shares anything with others."""
    return [batch.tokens[places] for places in batch.places], batch.targets.split(list(batch.lengths))


def _padded(rows: Sequence[torch.Tensor], filler: int) -> torch.Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=filler)
