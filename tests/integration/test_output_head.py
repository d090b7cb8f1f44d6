"""An output head that is outsourced by name, encrypted, over the real queue: as one that stays."""

from __future__ import annotations

from pathlib import Path

import pytest

import hetrain
from hetrain.config import OutsourcingConfig, TrainingConfig
from tests.harness.tiny_model import save_tiny_model

ROWS = "".join(
    f'{{"text": "the {name} keeps its own counsel, said {name} to nobody"}}\n' for name in "abcdefgh"
)


def test_training_with_the_output_head_on_workers(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", ROWS)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(ROWS)
    training = TrainingConfig(max_steps=3, batch_tokens=128, micro_batch_tokens=64, max_length=32)
    losses: dict[tuple[str, ...], list[float]] = {}
    for patterns in (("*",), ("*", "lm_head")):
        losses[patterns] = []
        hetrain.finetune(
            rows,
            model=str(tmp_path / "model"),
            output_dir=tmp_path / f"out-{len(patterns)}",
            training=training,
            outsourcing=OutsourcingConfig(outsource=patterns),
            on_step=lambda metrics, found=losses[patterns]: found.append(metrics.loss),
        )
    here, there = losses.values()
    assert len(here) == len(there) > 0
    assert there == pytest.approx(here, rel=2e-3)
    assert there != here
