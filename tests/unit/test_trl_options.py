"""A YAML of TRL's SFT options: what is taken, what has no effect, and what is refused with its reason."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest

from cli.submit import submit
from cli.trl_options import RULES, translate
from hetrain.config import LoraConfig, TrainingConfig, TrainingDataConfig
from hetrain.public.errors import UsageError
from tests.unit.test_options import called_with, typed

# As TRL's own examples have it; only model and data are others.
SFT = """\
model_name_or_path: some/model
dataset_name: owner/rows
dataset_train_split: train_sft
dataset_test_split: test_sft
learning_rate: 2.0e-4
num_train_epochs: 1
max_length: 512
packing: {packing}
per_device_train_batch_size: 4
per_device_eval_batch_size: 8
gradient_accumulation_steps: 2
gradient_checkpointing: true
gradient_checkpointing_kwargs: {{use_reentrant: false}}
eval_strategy: steps
eval_steps: 100
logging_steps: 25
lr_scheduler_type: cosine
warmup_ratio: 0.1
weight_decay: 0.01
optim: adamw_torch_fused
max_grad_norm: 0.5
use_peft: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: all-linear
use_rslora: true
bf16: false
attn_implementation: flash_attention_2
output_dir: sft
save_strategy: steps
save_steps: 200
save_total_limit: 1
load_best_model_at_end: true
metric_for_best_model: eval_loss
report_to: none
seed: 7
push_to_hub: false
"""
WITHOUT_EFFECT = (
    "packing",
    "per_device_eval_batch_size",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "logging_steps",
    "optim",
    "use_peft",
    "bf16",
    "attn_implementation",
    "save_strategy",
    "metric_for_best_model",
    "push_to_hub",
)
TRAINING = TrainingConfig(
    num_train_epochs=1,
    max_length=512,
    gradient_accumulation_steps=2,
    eval_strategy="steps",
    eval_steps=100,
    lr_scheduler_type="cosine",
    warmup_ratio=0.1,
    weight_decay=0.01,
    max_grad_norm=0.5,
    save_steps=200,
    save_total_limit=1,
    load_best_model_at_end=True,
    seed=7,
)


@pytest.mark.parametrize("packing", [False, True])
def test_a_file_of_trl_is_read_as_trl_means_it(
    packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text(SFT.format(packing=str(packing).lower()))
    with caplog.at_level(logging.INFO):
        given = called_with(monkeypatch, "finetune", submit, "--config", str(file))
    assert (given["dataset"], given["model"]) == (("owner/rows",), "some/model")
    assert given["data"] == TrainingDataConfig(
        dataset_train_split="train_sft", dataset_test_split="test_sft", eval_dataset="owner/rows"
    )
    assert given["lora"] == LoraConfig(r=32, alpha=16, dropout=0.05, use_rslora=True)
    # Packed, a row of TRL's batch is a block of max_length tokens.
    size = {"micro_batch_tokens": 2048} if packing else {"per_device_train_batch_size": 4}
    assert given["training"] == dataclasses.replace(TRAINING, **size)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith(f"{file}: without effect here: ")
    assert all(f"{name} (" in line for name in WITHOUT_EFFECT)
    assert line.count(" (") == len(WITHOUT_EFFECT)


def test_what_has_no_meaning_is_refused_by_name_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "sft.yaml"
    wrong = {
        "bf16: false": "bf16: true",
        "push_to_hub: false": "push_to_hub: true",
        "use_peft: true": "use_peft: no",
    }
    text = SFT.format(packing="false")
    for was, now in wrong.items():
        text = text.replace(was, now)
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        raise typed("--config", str(file)).exception or AssertionError
    for name in ("bf16", "push_to_hub", "use_peft"):
        assert f"{name} has no meaning here: {RULES[name].reason}" in caught.value.what
    assert caught.value.what.count("has no meaning") == len(wrong)


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ({"warmup_steps": 0.1}, {"warmup_ratio": 0.1}),
        ({"warmup_steps": 10}, {"warmup_steps": 10}),
        ({"max_seq_length": 5}, {"max_length": 5}),
        ({"evaluation_strategy": "epoch"}, {"eval_strategy": "epoch"}),
        ({"eval_strategy": False}, {"eval_strategy": "no"}),
        ({"save_strategy": "no"}, {"save_steps": 0}),
        ({"save_strategy": False}, {"save_steps": 0}),
        ({"resume_from_checkpoint": True}, {"resume_from_checkpoint": "latest"}),
        ({"report_to": []}, {"report_to": "none"}),
        (
            {"per_device_train_batch_size": 2},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
        ),
        (
            {"per_device_train_batch_size": 2, "packing": True},
            {"micro_batch_tokens": 2048, "gradient_accumulation_steps": 1},
        ),
    ],
)
def test_what_is_said_in_other_words_is_translated(given: dict[str, Any], values: dict[str, Any]) -> None:
    found = translate(given)
    assert not found.refused
    assert {found.spelled[name]: value for name, value in found.values.items()} == values
