"""Evaluation during training: when it happens, what it decides, and that a stop changes nothing of it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hetrain.config import JobSpec, LoraConfig, OutsourcingConfig, TrainingConfig, TrainingDataConfig
from hetrain.data.dataset import read_job_rows
from hetrain.nn.initial_adapter import require_alike
from hetrain.public.errors import Interrupted, UsageError
from hetrain.train.callbacks import Callbacks
from hetrain.train.checkpoint import checkpoint_steps, find_checkpoint
from hetrain.train.evaluation import Evaluation
from hetrain.train.finetune import finetune
from hetrain.train.outcome import JobResult
from tests.harness.processes import HANDBOOK, broker_with_worker

# With this rate the held-out loss rises after the first update, before it falls again.
WILD = TrainingConfig(
    learning_rate=0.1,
    lr_scheduler_type="constant",
    batch_tokens=128,
    micro_batch_tokens=128,
    max_length=64,
    max_steps=5,
    eval_strategy="steps",
    eval_steps=1,
)
PATIENT = replace(WILD, early_stopping_patience=2, load_best_model_at_end=True, save_total_limit=1)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def spec(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobSpec]:
    """A worker that all runs share, few rows to learn, and a few of the same form that are held out."""
    lines = HANDBOOK.read_text().splitlines(keepends=True)
    files = tmp_path_factory.mktemp("rows")
    for name, some in (("learned.jsonl", lines[:12]), ("held_out.jsonl", lines[100:106])):
        (files / name).write_text("".join(some))
    with broker_with_worker(tiny_llama) as broker:
        yield JobSpec(
            dataset=str(files / "learned.jsonl"),
            data=TrainingDataConfig(eval_dataset=str(files / "held_out.jsonl")),
            model=str(tiny_llama),
            workers=broker.url,
            output_dir=Path("/nonexistent"),
            lora=LoraConfig(r=4, alpha=8),
            outsourcing=OutsourcingConfig(engine="clear"),
        )


class Losses:
    """The held-out losses by update, as they come."""

    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}

    def take(self, step: int, evaluation: Evaluation) -> None:
        assert step not in self.by_step, "evaluated twice"
        self.by_step[step] = evaluation.loss


def run(
    spec: JobSpec, training: TrainingConfig, output: Path, resume: str | None = None
) -> tuple[JobResult, Losses]:
    losses = Losses()
    job = replace(spec, training=training, output_dir=output, resume_from_checkpoint=resume)
    return finetune(job, read_job_rows(job), Callbacks(on_evaluation=losses.take)), losses


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(directory / "adapter_model.safetensors"))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def records(output: Path, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def expected(spec: JobSpec, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The held-out losses of a run that goes on to its end: the first is less than the two that follow."""
    output = tmp_path_factory.mktemp("whole")
    result, losses = run(spec, WILD, output)
    assert list(losses.by_step) == [1, 2, 3, 4, 5]
    assert losses.by_step[1] < min(losses.by_step[2], losses.by_step[3])
    assert (result.steps, result.adapter_step) == (5, 5)
    assert result.evaluation is not None
    assert result.evaluation.loss == losses.by_step[5]
    assert [line["step"] for line in records(output, "evaluations.jsonl")] == [1, 2, 3, 4, 5]
    return losses.by_step


def test_training_ends_early_and_the_best_adapter_is_the_output(
    spec: JobSpec, tmp_path: Path, expected: dict[int, float]
) -> None:
    result, losses = run(spec, PATIENT, tmp_path)
    assert losses.by_step == {step: expected[step] for step in (1, 2, 3)}
    assert (result.steps, result.adapter_step) == (3, 1)
    assert str(result).startswith("3 updates of 5, ended early")
    assert "Adapter of update 1 in" in str(result)
    assert result.evaluation is not None
    assert result.evaluation.loss == expected[1]
    # The best one is kept beside the newest.
    assert checkpoint_steps(tmp_path) == [1, 3]
    assert same(adapter(tmp_path), adapter(tmp_path / "checkpoint-1"))
    assert not same(adapter(tmp_path), adapter(tmp_path / "checkpoint-3"))
    job = json.loads((tmp_path / "job.json").read_text())
    assert (job["status"], job["steps"], job["adapter_step"]) == ("done", 3, 1)

    assert (
        "this is the adapter of update 1, with the least held-out loss"
        in (tmp_path / "README.md").read_text()
    )

    # It goes on where more patience is given, and only there.
    with pytest.raises(UsageError, match="training has ended early: 2 evaluations") as caught:
        run(spec, PATIENT, tmp_path, "latest")
    assert "`early_stopping_patience`" in caught.value.hint
    result, losses = run(spec, replace(PATIENT, early_stopping_patience=9), tmp_path, "latest")
    assert losses.by_step == {step: expected[step] for step in (4, 5)}
    assert (result.steps, result.adapter_step) == (5, min(expected, key=lambda step: expected[step]))


def test_what_evaluations_have_shown_survives_a_stop(
    spec: JobSpec, tmp_path: Path, expected: dict[int, float]
) -> None:
    def stop(step: int, evaluation: Evaluation) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    job = replace(spec, training=PATIENT, output_dir=tmp_path)
    with pytest.raises(Interrupted):
        finetune(job, read_job_rows(job), Callbacks(on_evaluation=stop))
    state = find_checkpoint("latest", tmp_path).state.evaluations
    assert (state.best_step, state.best_loss, state.not_improved) == (1, expected[1], 1)
    with pytest.raises(UsageError, match="the run was to make 5 updates: 4 are fewer"):
        run(spec, replace(PATIENT, max_steps=4), tmp_path, "latest")
    result, losses = run(spec, PATIENT, tmp_path, "latest")
    assert losses.by_step == {3: expected[3], 1: expected[1]}
    assert (result.steps, result.adapter_step) == (3, 1)
    assert same(adapter(tmp_path), adapter(tmp_path / "checkpoint-1"))
    lines = records(tmp_path, "evaluations.jsonl")
    # The adapter that is the output was evaluated by the run before: it is evaluated once more.
    assert [line["step"] for line in lines] == [1, 2, 3, 1]
    assert [line["loss"] for line in lines] == [expected[step] for step in (1, 2, 3, 1)]


def test_an_evaluation_that_was_abandoned_is_made_up_for(spec: JobSpec, tmp_path: Path) -> None:
    """After two signals a run leaves in the middle of it."""
    sent = []

    def leave(done: int, total: int) -> None:
        if not sent:
            sent.append(True)
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    how = replace(WILD, max_steps=2)
    job = replace(spec, training=how, output_dir=tmp_path)
    with pytest.raises(Interrupted):
        finetune(job, read_job_rows(job), Callbacks(on_evaluating=leave))
    assert checkpoint_steps(tmp_path) == [1]
    assert find_checkpoint("latest", tmp_path).state.evaluations.step == 0
    _, losses = run(spec, how, tmp_path, "latest")
    assert list(losses.by_step) == [1, 2]


def test_a_finished_run_is_extended(spec: JobSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    how = replace(
        WILD, learning_rate=0.01, lr_scheduler_type="linear", eval_strategy="epoch", eval_steps=None
    )
    epochs = replace(how, max_steps=-1, num_train_epochs=1)
    first, losses = run(spec, epochs, tmp_path)
    assert list(losses.by_step) == [first.steps]
    with pytest.raises(UsageError, match=f"all {first.steps} updates have been made") as caught:
        run(spec, epochs, tmp_path, "latest")
    assert "`max_steps` or `num_train_epochs` to extend it" in caught.value.hint

    with caplog.at_level("INFO"):
        second, losses = run(spec, replace(epochs, num_train_epochs=2), tmp_path, "latest")
    assert second.steps == 2 * first.steps
    assert list(losses.by_step) == [second.steps]
    lines = records(tmp_path, "metrics.jsonl")
    assert [line["micro_batch"] for line in lines] == list(range(len(lines)))
    assert [line["step"] for line in lines] == list(range(1, second.steps + 1))
    # The rate of each half is that of a run of its length: it falls to nothing, then starts at half the peak.
    rates = [line["learning_rate"] for line in lines]
    expected = [1 - step / first.steps for step in range(first.steps)]
    expected += [1 - step / second.steps for step in range(first.steps, second.steps)]
    assert rates == pytest.approx([0.01 * each for each in expected])
    said = (
        f"{second.steps} updates instead of {first.steps}: from here on the learning rate is that of linear"
    )
    assert said in caplog.text


def test_a_run_starts_from_an_adapter(spec: JobSpec, tmp_path: Path) -> None:
    how = replace(WILD, max_steps=2, eval_steps=2, save_steps=0)
    rank = replace(spec, lora=LoraConfig(r=9, alpha=3, use_rslora=True))
    _, losses = run(rank, how, tmp_path / "first")
    config = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["r"]) == (True, 9)
    went_on, _ = run(
        replace(rank, init_from=tmp_path / "first"), replace(how, learning_rate=1e-9), tmp_path / "second"
    )
    assert went_on.evaluation is not None
    assert went_on.evaluation.loss == pytest.approx(losses.by_step[2], rel=1e-4)
    differing = {
        "`r` is 9 in the adapter to start from, and 4 in this job": {},
        "`use_rslora` is True in the adapter": {"r": 9, "alpha": 3},
        "`alpha` is 3 in the adapter": {"r": 9, "alpha": 9, "use_rslora": True},
    }
    for says, lora in differing.items():
        with pytest.raises(UsageError, match=says) as caught:
            require_alike(tmp_path / "first", LoraConfig(**{"r": 4} | lora))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    fewer = replace(rank, lora=replace(rank.lora, target_modules=("q_proj",)), init_from=tmp_path / "first")
    with pytest.raises(UsageError, match="this job has no base_model"):
        run(fewer, how, tmp_path / "third")
    with pytest.raises(UsageError, match="belongs to"):
        run(replace(rank, init_from=tmp_path / "first", model="smollm2-135m"), how, tmp_path / "third")
