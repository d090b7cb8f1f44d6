"""The self-check of an export: its loss on held-out rows is the trained adapter's, within a stated bound."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from hetrain.config import BatchingConfig, DataConfig
from hetrain.data.packing import IGNORE_INDEX
from hetrain.data.tokenization import Row, read_rows
from hetrain.nn.adapter_files import read_job
from hetrain.public.errors import DatasetError, HetrainError, ModelError, UsageError
from hetrain.train.records import last_evaluated

_log = logging.getLogger(__name__)

LOSS_BOUNDS: Mapping[str, float] = MappingProxyType({"float32": 1e-3, "float16": 5e-3, "bfloat16": 5e-2})
"""Largest difference of two mean losses in nats, by the type of the exported weights.

Five to ten times what SmolLM2-135M showed on rows of the handbook.
"""
_TOKENS_AT_ONCE, _TOKENS_OF_TEXT = 2048, 512
_TEXT = """Question: How does a mill grind corn?
Answer: The river turns a wheel, and the wheel turns a stone of about 1,200 kg. The corn falls through a
hole in its middle, is crushed between two stones, and leaves as flour at their edge. A miller listens: when
the sound grows dull, the stones stand too close, and when it rings, too far apart.

def mean(values: list[float]) -> float:
    if not values:
        raise ValueError("there are no values")
    return sum(values) / len(values)

Le meunier, son fils et l'âne. Die Mühle steht am Bach; im Winter friert er zu. 1998, 2004 and 2017 were
dry years, in which the mill stood still for 31, 27 and 64 days. "We waited for rain", said the miller's
daughter, "and read everything that lay in the house: three novels, an atlas, and the price lists of a
seed merchant from 1911."
"""


@dataclass(frozen=True)
class LossCheck:
    """Mean losses per target over the same rows, in clear: of the trained adapter and of its export.

    `dataset` is None where a fixed text took the place of rows.
    """

    dataset: Path | None
    rows: int
    trained: float
    exported: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether they differ by `bound` at most; false if one is not finite."""
        return abs(self.trained - self.exported) <= self.bound

    def __str__(self) -> str:
        rows = f"{self.rows} rows of {self.dataset}" if self.dataset else "a fixed text"
        return (
            f"loss on {rows}: trained {self.trained:.5f}, "
            f"exported {self.exported:.5f}, apart by at most {self.bound}"
        )

    def require(self) -> None:
        """Raises `ModelError` unless it holds."""
        if not self.holds:
            raise ModelError(
                f"the export is not the trained adapter, and was not kept: its loss is {self.exported:.5f}, "
                f"that of the adapter {self.trained:.5f}, more than {self.bound} apart",
                where=str(self.dataset or "fixed text"),
                hint="choose a more exact type; if it is float32, report it as a fault",
            )


@dataclass(frozen=True)
class HeldOutRows:
    """Rows to check with; `dataset` as in `LossCheck`."""

    dataset: Path | None
    rows: Sequence[Row]

    def compare(self, trained: float, exported: float, dtype: str) -> LossCheck:
        """The check of two losses. Raises `ModelError` when it fails."""
        check = LossCheck(self.dataset, len(self.rows), trained, exported, LOSS_BOUNDS[dtype])
        check.require()
        return check


def held_out_rows(given: Path | None, adapter: Path, tokenizer: PreTrainedTokenizerBase) -> HeldOutRows:
    """The rows of the data set `given`, or else of the last one that the adapter was evaluated on.

    Without either, or if the latter cannot be read, which is a warning, it is a fixed text: the losses of an
    adapter and of its export agree on any.

    Raises:
        DatasetError: the rows of `given` have neither the columns of the training job nor the default ones.
        UsageError: as DatasetError.
    """
    learned = data_config(read_job(adapter).get("data") or {})
    if given is not None:
        return _given_rows(given, tokenizer, learned)
    evaluated = last_evaluated(adapter)
    if evaluated is not None:
        dataset, recorded = evaluated
        try:
            return _read(dataset, tokenizer, data_config(recorded) if recorded else learned)
        except HetrainError as error:
            _log.warning("not checked on the rows of the last evaluation: %s", error)
    return fixed_text(tokenizer)


def _given_rows(given: Path, tokenizer: PreTrainedTokenizerBase, learned: DataConfig) -> HeldOutRows:
    try:
        return _read(given, tokenizer, learned)
    except (DatasetError, UsageError) as error:
        try:
            return _read(given, tokenizer, DataConfig())
        except (DatasetError, UsageError):
            raise error from None


def _read(dataset: Path, tokenizer: PreTrainedTokenizerBase, columns: DataConfig) -> HeldOutRows:
    return HeldOutRows(dataset, read_rows(dataset, tokenizer, BatchingConfig().longest_row, columns))


def fixed_text(tokenizer: PreTrainedTokenizerBase) -> HeldOutRows:
    """A text that tokenizers make a few hundred tokens of, all of them targets but the first."""
    tokens = tuple(tokenizer(_TEXT)["input_ids"][:_TOKENS_OF_TEXT])
    return HeldOutRows(None, [Row(tokens, (False,) + (True,) * (len(tokens) - 1), 1)])


def data_config(recorded: Mapping[str, Any]) -> DataConfig:
    """Which columns a run read, as job.json or evaluations.jsonl have it; defaults for what is missing."""
    return DataConfig(
        **{each.name: recorded[each.name] for each in fields(DataConfig) if each.name in recorded}
    )


@torch.inference_mode()
def mean_loss(model: nn.Module, rows: Sequence[Row], device: str) -> float:
    """Mean −log p over the targets of all rows, with the model's own forward pass."""
    total, targets = 0.0, 0
    for batch in _batches(rows):
        width = max(len(row.tokens) for row in batch)
        tokens = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        labels = torch.full_like(tokens, IGNORE_INDEX)
        for index, row in enumerate(batch):
            length = len(row.tokens)
            tokens[index, :length] = torch.tensor(row.tokens)
            mask[index, :length] = 1
            labels[index, :length] = torch.where(
                torch.tensor(row.supervised), tokens[index, :length], IGNORE_INDEX
            )
        logits = model(input_ids=tokens.to(device), attention_mask=mask.to(device)).logits.float()
        predicted, expected = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(device)
        total += float(cross_entropy(predicted, expected, ignore_index=IGNORE_INDEX, reduction="sum"))
        targets += int((expected != IGNORE_INDEX).sum())
    return total / targets


def _batches(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of similar lengths together, as many as fit when all are as long as the longest."""
    batches: list[list[Row]] = [[]]
    for row in sorted(rows, key=lambda row: len(row.tokens)):
        if (len(batches[-1]) + 1) * len(row.tokens) > _TOKENS_AT_ONCE and batches[-1]:
            batches.append([])
        batches[-1].append(row)
    return batches
