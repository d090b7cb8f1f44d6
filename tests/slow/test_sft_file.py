"""A file of `trl sft` is tried without a job, then trained; no line is another but model and data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.processes import HANDBOOK, BrokerServer, broker_with_worker, hetrain

SFT = """\
model_name_or_path: {model}
dataset_name: {rows}
validation_split: 0.25
learning_rate: 2.0e-3
num_train_epochs: 1
max_length: 64
packing: false
per_device_train_batch_size: 3
gradient_accumulation_steps: 2
gradient_checkpointing: true
eval_strategy: epoch
logging_steps: 1
lr_scheduler_type: cosine
warmup_ratio: 0.5
use_peft: true
lora_r: 4
lora_alpha: 8
lora_target_modules: [q_proj, v_proj]
bf16: false
output_dir: {output}
report_to: none
seed: 7
push_to_hub: false
"""


@pytest.fixture(scope="module")
def broker(tiny_llama: Path) -> Iterator[BrokerServer]:
    """A broker with a worker that serves the model, and has answered."""
    with broker_with_worker(tiny_llama) as server:
        made = hetrain("prepare", tiny_llama, "--broker-url", server.url)
        assert made.returncode == 0, made.stderr
        yield server


def test_it_is_tried_and_trained(tiny_llama: Path, tmp_path: Path, broker: BrokerServer) -> None:
    rows, output, file = tmp_path / "rows.jsonl", tmp_path / "out", tmp_path / "sft.yaml"
    rows.write_text("".join(HANDBOOK.read_text().splitlines(keepends=True)[:16]))
    file.write_text(SFT.format(model=tiny_llama, rows=rows, output=output))
    job = ("submit", "--config", file, "--broker-url", broker.url, "--json")

    tried = hetrain(*job, "--dry-run")
    assert tried.returncode == 0, tried.stderr
    # 12 of 16 rows are learned, 3 x 2 an update; q and v of two layers, 64 -> 64 and 32.
    found = json.loads(tried.stdout)
    assert found.pop("digest")
    assert found == {
        "event": "dry_run",
        "model": tiny_llama.name,
        "total_steps": 2,
        "done_steps": 0,
        "adapter_parameters": 2 * 4 * (64 + 64 + 64 + 32),
        "held_out_rows": 4,
        "output_dir": str(output),
    }
    assert not output.exists()
    assert not list(broker.connect().scan_iter("hetrain:*:*"))

    done = hetrain(*job)
    assert done.returncode == 0, done.stderr
    (said,) = (part for part in " ".join(done.stderr.split()).split("INFO") if "without effect here" in part)
    for name in ("packing", "gradient_checkpointing", "logging_steps", "use_peft", "bf16", "push_to_hub"):
        assert f"{name} (" in said
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["micro_batch"]) for line in metrics] == [(1, 0), (1, 1), (2, 2), (2, 3)]
    assert [line["learning_rate"] for line in metrics] == [0, 0, 2e-3, 2e-3]  # warm-up is one of two updates
    events = [json.loads(line) for line in done.stdout.splitlines()]
    (evaluation,) = (event for event in events if event["event"] == "evaluation")
    assert (evaluation["step"], events[-1]["evaluation"]["loss"]) == (2, evaluation["loss"])

    # What would not run is said by the trial, too.
    again = hetrain(*job, "--dry-run")
    assert again.returncode == 2
    assert "--overwrite-output-dir" in " ".join(again.stderr.split())
    other = hetrain(*job, "--dry-run", "-m", "smollm2-135m", "-o", tmp_path / "other")
    assert other.returncode == 8
    assert "no worker serves 'smollm2-135m'" in " ".join(other.stderr.split())
    assert not (tmp_path / "other").exists()
