"""A run that is stopped and goes on ends like one that was never stopped."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hetrain.config import JobSpec, LoraConfig, OutsourcingConfig, TrainingConfig
from hetrain.data.dataset import read_job_rows
from hetrain.public.errors import Interrupted, NotFinite, UsageError
from hetrain.train.callbacks import Callbacks
from hetrain.train.checkpoint import checkpoint_steps
from hetrain.train.finetune import finetune
from hetrain.train.metrics import MicroBatchMetrics
from hetrain.train.outcome import JobResult
from hetrain.train.signals import restored_handlers, stop_on_signals
from tests.harness.processes import HANDBOOK, broker_with_worker

TRAINING = TrainingConfig(
    learning_rate=1e-2,
    lr_scheduler_type="cosine",
    warmup_steps=2,
    batch_tokens=256,
    micro_batch_tokens=256,
    max_length=64,
    seed=5,
)
IN_STEP = replace(TRAINING, batch_tokens=512)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def spec(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobSpec]:
    """A worker that all runs share; the output directory is still missing."""
    with broker_with_worker(tiny_llama) as broker:
        yield JobSpec(
            dataset=(str(HANDBOOK),),
            model=str(tiny_llama),
            workers=broker.url,
            output_dir=Path("/nonexistent"),
            lora=LoraConfig(r=4, alpha=8, dropout=0.1),
            outsourcing=OutsourcingConfig(engine="clear"),
        )


class Signals:
    """Callbacks that signal its own process when an update has been made."""

    def __init__(self, at: int, times: int) -> None:
        self._at, self._times = at, times
        self._sent = False
        self.stops = 0

    def on_step(self, metrics: MicroBatchMetrics) -> None:
        if metrics.step == self._at and not self._sent:
            self._sent = True
            for _ in range(self._times):
                os.kill(os.getpid(), signal.SIGINT)

    def on_stop(self) -> None:
        self.stops += 1


def run(spec: JobSpec, training: TrainingConfig, output: Path, resume: str | None = None) -> JobResult:
    job = replace(spec, training=training, output_dir=output, resume_from_checkpoint=resume)
    return finetune(job, read_job_rows(job))


def interrupt(spec: JobSpec, training: TrainingConfig, output: Path, at: int, times: int = 1) -> Interrupted:
    signals = Signals(at, times)
    job = replace(spec, training=training, output_dir=output)
    rows = read_job_rows(job)
    with pytest.raises(Interrupted) as caught:
        finetune(job, rows, Callbacks(on_step=signals.on_step, on_stop=signals.on_stop))
    assert signals.stops == (times == 1)
    assert json.loads((output / "job.json").read_text())["status"] == "interrupted"
    return caught.value


def metrics(output: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def course(output: Path) -> list[tuple[object, ...]]:
    """What must repeat to the bit."""
    names = ("step", "micro_batch", "loss", "learning_rate", "grad_norm", "staleness")
    return [tuple(record[name] for name in names) for record in metrics(output)]


def assert_same_adapter(a: Path, b: Path) -> None:
    first, second = (load_file(path / "adapter_model.safetensors") for path in (a, b))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_second_signal_waits_for_the_end_of_an_update() -> None:
    calls = []
    former = signal.getsignal(signal.SIGTERM)
    with restored_handlers(), stop_on_signals(lambda: calls.append(True)) as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert (asked(), asked(), calls) == (True, True, [True])
        os.kill(os.getpid(), signal.SIGTERM)  # here an update could be half applied
        with pytest.raises(KeyboardInterrupt):
            asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is former


def test_a_second_signal_does_not_interrupt_what_is_written_at_the_end() -> None:
    with restored_handlers():
        with stop_on_signals(lambda: None) as asked:
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):  # a way out
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_in_lock_step_a_stop_changes_not_a_bit(
    spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With more threads a product may add its terms in another order: each micro-batch has one.
    monkeypatch.setattr("hetrain.train.step.available_cores", lambda: 1)
    undisturbed, stopped, left = (tmp_path / name for name in ("undisturbed", "stopped", "left"))
    run(spec, replace(IN_STEP, max_steps=6), undisturbed)
    assert checkpoint_steps(undisturbed) == [6]

    error = interrupt(spec, replace(IN_STEP, max_steps=6), stopped, at=2)
    assert "`resume_from_checkpoint` latest" in str(error)
    reached = checkpoint_steps(stopped)[-1]
    assert 2 <= reached <= 3  # the update that had begun was finished
    assert course(stopped) == course(undisturbed)[: 2 * reached]
    assert_same_adapter(stopped, stopped / f"checkpoint-{reached}")
    files = sorted(path.name for path in (stopped / f"checkpoint-{reached}").iterdir())
    assert files == [
        "SHA256SUMS",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "optimizer.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
    ]
    # How much may be in flight changes nothing: room for little more than one product is enough.
    narrow = replace(IN_STEP, max_steps=6, in_flight=1, max_bytes_in_flight=300_000)
    outcome = run(spec, narrow, stopped, "latest")
    assert (outcome.steps, outcome.tokens) == (6, sum(int(r["tokens"]) for r in metrics(undisturbed)))  # type: ignore[call-overload]
    assert course(stopped) == course(undisturbed)
    assert_same_adapter(stopped, undisturbed)
    elapsed = [float(record["elapsed_s"]) for record in metrics(stopped)]  # type: ignore[arg-type]
    assert elapsed == sorted(elapsed)

    # Twice: it leaves at once. And it may go on from an older checkpoint, which drops what came after.
    how = replace(IN_STEP, max_steps=6, save_steps=1, save_total_limit=2)
    interrupt(spec, how, left, at=4, times=2)
    assert checkpoint_steps(left) == [3, 4]
    with (left / "metrics.jsonl").open("a") as log:
        log.write('{"step": 5, "half a li')
    (left / ".checkpoint-9.new").mkdir()
    run(spec, how, left, str(left / "checkpoint-3"))
    assert checkpoint_steps(left) == [5, 6]
    assert course(left) == course(undisturbed)
    assert_same_adapter(left, undisturbed)
    assert not list(left.glob(".*"))


def test_while_updates_overlap_every_micro_batch_counts_once(spec: JobSpec, tmp_path: Path) -> None:
    how = replace(TRAINING, in_flight=3, max_staleness=3, max_steps=12)
    interrupt(spec, how, tmp_path, at=4)
    run(spec, how, tmp_path, "latest")
    records = metrics(tmp_path)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert [record["micro_batch"] for record in records] == list(range(12))
    staleness = [int(record["staleness"]) for record in records]  # type: ignore[call-overload]
    assert staleness[:2] == [0, 0], "none during warm-up"
    assert 0 < max(staleness) <= 3


@pytest.mark.parametrize("how", [TRAINING, IN_STEP])
def test_a_run_that_diverges_ends_at_a_checkpoint_from_which_it_goes_on(
    spec: JobSpec, tmp_path: Path, how: TrainingConfig
) -> None:
    how = replace(how, learning_rate=1e30, warmup_steps=0, max_staleness=0, max_steps=9)
    with pytest.raises(NotFinite, match="2 updates in a row, up to update 3,"):
        run(spec, replace(how, max_skipped_updates=2), tmp_path)
    assert checkpoint_steps(tmp_path) == [3]
    assert json.loads((tmp_path / "job.json").read_text())["status"] == "failed"
    assert_same_adapter(tmp_path, tmp_path / "checkpoint-3")
    with pytest.raises(NotFinite, match="3 updates in a row, up to update 6,"):
        run(spec, replace(how, max_skipped_updates=3), tmp_path, "latest")
    assert checkpoint_steps(tmp_path) == [3, 6]
    assert_same_adapter(tmp_path, tmp_path / "checkpoint-3")
    last = {record["step"]: record for record in metrics(tmp_path)}
    assert [last[step]["skipped_updates"] for step in sorted(last)] == [0, 1, 2, 3, 4, 5]
    assert [last[step]["grad_norm"] is None for step in sorted(last)] == [False] + [True] * 5
    outcome = run(spec, replace(how, max_skipped_updates=4), tmp_path, "latest")
    assert (outcome.steps, outcome.skipped_updates) == (9, 8)
    assert "9 updates (8 of them skipped)" in str(outcome)


def test_what_does_not_belong_together_is_refused_and_nothing_is_lost(spec: JobSpec, tmp_path: Path) -> None:
    output, how = tmp_path / "out", replace(IN_STEP, max_steps=4)
    interrupt(spec, how, output, at=2)
    latest = output / f"checkpoint-{checkpoint_steps(output)[-1]}"
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("".join(HANDBOOK.read_text().splitlines(keepends=True)[:-1]))

    def refused(says: str, attempt: Callable[[], object]) -> None:
        with pytest.raises(UsageError) as caught:
            attempt()
        assert says in str(caught.value)

    other_rate = replace(how, learning_rate=1e-3)
    refused("`learning_rate` was 0.01, is 0.001", lambda: run(spec, other_rate, output, "latest"))
    other_rows = replace(spec, dataset=shorter)
    refused("the data set (the SHA-256 of its tokens) was", lambda: run(other_rows, how, output, "latest"))
    fewer = replace(spec, outsourcing=OutsourcingConfig(engine="clear", outsource=("*.mlp.*",)))
    refused("outsource", lambda: run(fewer, how, output, "latest"))
    refused("there is no checkpoint", lambda: run(spec, how, tmp_path / "empty", "latest"))
    refused("there is no checkpoint", lambda: run(spec, how, output, str(output)))
    refused("`overwrite_output_dir`", lambda: run(spec, how, output))
    narrow = replace(how, max_bytes_in_flight=200_000)
    refused("`max_bytes_in_flight`", lambda: run(spec, narrow, tmp_path / "narrow"))
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "empty").exists()

    moments = latest / "optimizer.safetensors"
    moments.write_bytes(moments.read_bytes()[:-7])
    refused("optimizer.safetensors is damaged", lambda: run(spec, how, output, str(latest)))
