"""A full disk, another run in the same directory, a run that was killed: nothing of a run is lost."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hetrain.config import JobSpec, LoraConfig, OutsourcingConfig, TrainingConfig
from hetrain.data.dataset import read_job_rows
from hetrain.public.errors import StorageError, UsageError
from hetrain.train.callbacks import Callbacks
from hetrain.train.checkpoint import checkpoint_steps
from hetrain.train.finetune import JobResult, finetune
from hetrain.train.metrics import MicroBatchMetrics
from hetrain.train.output_dir import OutputDirectory
from tests.harness.processes import HANDBOOK, HETRAIN, broker_with_worker, hetrain
from tests.harness.small_disk import SmallDisk, small_disk

TRAINING = TrainingConfig(
    batch_tokens=256, micro_batch_tokens=256, max_length=64, max_steps=9, max_staleness=0, save_steps=2
)
ALL = list(range(1, 10))
DISK_BYTES = 24 << 20

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shared(tiny_llama: Path) -> Iterator[JobSpec]:
    """A worker that all runs share."""
    with broker_with_worker(tiny_llama) as broker:
        yield JobSpec(
            dataset=HANDBOOK,
            model=str(tiny_llama),
            workers=broker.url,
            output_dir=Path("/nonexistent"),
            lora=LoraConfig(r=4, alpha=8),
            training=TRAINING,
            outsourcing=OutsourcingConfig(engine="clear"),
        )


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A small disk."""
    with small_disk(tmp_path / "disk", DISK_BYTES) as small:
        yield small


@pytest.fixture
def spec(shared: JobSpec, disk: SmallDisk) -> JobSpec:
    """A job that writes to it."""
    return replace(shared, output_dir=disk.path / "out")


@pytest.fixture
def mounted(disk: SmallDisk) -> SmallDisk:
    """The same, where room that was reserved can be given back."""
    if not disk.is_mounted:
        pytest.skip("no file system can be mounted here")
    return disk


def train(spec: JobSpec, on_step: Callable[[MicroBatchMetrics], object] = lambda metrics: None) -> JobResult:
    return finetune(spec, read_job_rows(spec), Callbacks(on_step=on_step))


def at(step: int, act: Callable[[], object]) -> Callable[[MicroBatchMetrics], None]:
    """Acts when an update has been recorded."""

    def on_step(metrics: MicroBatchMetrics) -> None:
        if metrics.step == step:
            act()

    return on_step


class WhenItWaits(logging.Handler):
    """Acts when a run says that it waits for room."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self._act = act
        self.times = 0

    def emit(self, record: logging.LogRecord) -> None:
        if "waits up to" in record.getMessage():
            self.times += 1
            self._act()


@pytest.fixture
def waits() -> Iterator[Callable[[Callable[[], object]], WhenItWaits]]:
    """Adds a `WhenItWaits`."""
    logger, added = logging.getLogger("hetrain"), []

    def add(act: Callable[[], object]) -> WhenItWaits:
        added.append(WhenItWaits(act))
        logger.addHandler(added[-1])
        return added[-1]

    yield add
    for handler in added:
        logger.removeHandler(handler)


def steps_of(output: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def status_of(output: Path) -> str:
    return str(json.loads((output / "job.json").read_text())["status"])


def assert_tidy(output: Path) -> None:
    assert not list(output.glob(".*"))
    assert output.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("leave", [0, 1 << 20], ids=["for nothing", "for the adapter but not its tokenizer"])
def test_training_waits_for_room(
    spec: JobSpec, disk: SmallDisk, waits: Callable[[Callable[[], object]], WhenItWaits], leave: int
) -> None:
    waiting = waits(disk.free)
    result = train(spec, at(3, partial(disk.fill, leave)))
    assert waiting.times == 1
    assert result.steps == 9
    assert steps_of(spec.output_dir) == ALL
    assert checkpoint_steps(spec.output_dir) == [8, 9]
    assert_tidy(spec.output_dir)


def test_a_disk_that_stays_full_ends_training_at_its_last_state(
    spec: JobSpec, mounted: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HETRAIN_DISK_WAIT_S", "0.3")
    with pytest.raises(StorageError) as caught:
        train(spec, at(3, mounted.fill))
    assert caught.value.exit_code == 10
    last = checkpoint_steps(spec.output_dir)[-1]
    mounted.free()
    assert 4 <= last <= 6
    for part in ("No space left", f"the adapter and checkpoint-{last} were written", "latest"):
        assert part in str(caught.value)
    assert status_of(spec.output_dir) == "failed"
    assert steps_of(spec.output_dir) == ALL[:last]
    assert_tidy(spec.output_dir)
    kept, checkpoint = (
        load_file(path / "adapter_model.safetensors")
        for path in (spec.output_dir, spec.output_dir / f"checkpoint-{last}")
    )
    assert all(bool((kept[name] == checkpoint[name]).all()) for name in kept)
    assert train(replace(spec, resume_from_checkpoint="latest")).steps == 9
    assert steps_of(spec.output_dir) == ALL


def test_a_signal_ends_the_wait(
    spec: JobSpec, mounted: SmallDisk, waits: Callable[[Callable[[], object]], WhenItWaits]
) -> None:
    waits(lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(StorageError, match="the adapter and checkpoint-"):
        train(spec, at(3, mounted.fill))


def test_a_disk_that_is_full_at_the_end_loses_nothing(spec: JobSpec, mounted: SmallDisk) -> None:
    result = train(replace(spec, training=replace(TRAINING, save_steps=0)), at(9, mounted.fill))
    assert result.steps == 9
    assert status_of(spec.output_dir) == "done"
    assert load_file(spec.output_dir / "adapter_model.safetensors")
    assert steps_of(spec.output_dir) == ALL


def test_no_room_at_the_start_is_said_before_training(spec: JobSpec, disk: SmallDisk) -> None:
    spec.output_dir.mkdir(mode=0o700)
    disk.fill()
    with pytest.raises(StorageError, match="cannot be written"):
        train(spec)
    disk.free()
    assert checkpoint_steps(spec.output_dir) == []


def test_a_second_run_in_the_same_directory_is_refused(shared: JobSpec, tmp_path: Path) -> None:
    spec = replace(shared, output_dir=tmp_path / "out")
    others = []

    def start_another() -> None:
        others.append(
            hetrain(
                "submit", HANDBOOK, "-m", spec.model, "-o", spec.output_dir, "--overwrite-output-dir",
                "--broker-url", spec.workers,
            )
        )  # fmt: skip

    assert train(spec, at(2, start_another)).steps == 9
    (other,) = others
    said = " ".join(other.stderr.split())
    assert other.returncode == 2, said
    assert f"another run writes here: process {os.getpid()} on " in said
    assert "Traceback" not in said
    assert steps_of(spec.output_dir) == ALL
    assert_tidy(spec.output_dir)


def test_a_directory_is_taken_over_from_a_run_that_was_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = (
        "import sys, time; from pathlib import Path; from hetrain.train.output_dir import OutputDirectory\n"
        "OutputDirectory(Path(sys.argv[1]), overwrite=False).reserve(1000)\n"
        "print('there', flush=True); time.sleep(600)"
    )
    output = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(output)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "there\n"
        other.kill()
    taken = OutputDirectory(output, overwrite=False)
    assert f"the run of process {other.pid} on " in caplog.text
    taken.reserve(1000)
    taken.close()
    assert_tidy(output)


def test_an_error_that_cannot_be_printed_keeps_its_exit_code(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [*HETRAIN, "status", "nosuch"]
        done = subprocess.run(command, stderr=full, env=os.environ | {"HETRAIN_STATE": str(tmp_path)})
    assert done.returncode == UsageError.exit_code
