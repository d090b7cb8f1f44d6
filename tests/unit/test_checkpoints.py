"""A checkpoint is whole or not there, wherever its writer is killed and whatever becomes of its files."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hetrain.config import LATEST
from hetrain.public.errors import UsageError
from hetrain.train.checkpoint import (
    ADAPTER_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    SUMS_FILE,
    Checkpoint,
    TrainerState,
    checkpoint_path,
    checkpoint_steps,
    find_checkpoint,
    remove_checkpoint,
    write_checkpoint,
)
from hetrain.train.output_dir import OutputDirectory

FILES = (ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE, SUMS_FILE)
_FILE_EVENTS = ("open", "os.", "shutil.")


def write(directory: Path, step: int) -> None:
    """The checkpoint of an update, every value of which is the update's number."""
    state = TrainerState(
        identity={"seed": 1},
        step=step,
        skipped_updates=0,
        micro_batches=step,
        total_steps=9,
        tokens=step,
        elapsed_s=1.0,
        schedule={},
    )
    values = {"a": torch.full((100,), float(step))}

    def adapter(scratch: Path) -> None:
        save_file(values, scratch / ADAPTER_FILE)

    write_checkpoint(directory, state, values, adapter)


def assert_whole(checkpoint: Checkpoint) -> None:
    for name in (ADAPTER_FILE, OPTIMIZER_FILE):
        assert load_file(checkpoint.path / name)["a"].tolist() == [checkpoint.state.step] * 100


def killed_at(event: int, run: Callable[[], None]) -> bool:
    """Runs it in a process that kills itself before its n-th operation on files. Whether that came."""
    pid = os.fork()
    if pid == 0:
        left = event

        def count(name: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if name.startswith(_FILE_EVENTS) and name != "os.kill":
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count)
            run()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def test_a_writer_may_be_killed_before_any_operation(tmp_path: Path) -> None:
    before = tmp_path / "before"
    before.mkdir()
    write(before, 1)
    write(before, 2)
    found = []
    for event in itertools.count():
        directory = tmp_path / f"killed-{event}"
        shutil.copytree(before, directory)
        if not killed_at(event, partial(replace_one, directory)):
            break
        for step in checkpoint_steps(directory):
            assert_whole(find_checkpoint(str(checkpoint_path(directory, step)), directory))
        found.append(find_checkpoint(LATEST, directory).state.step)
        output = OutputDirectory(directory, overwrite=True)  # the next run
        output.reserve(1)
        output.close()
        assert not list(directory.glob(".*"))
    assert found == sorted(found)
    assert set(found) == {2, 3}
    assert len(found) > 20


def test_a_checkpoint_that_is_there_already_is_replaced(tmp_path: Path) -> None:
    """Its directory may not have been synchronised: then it is written again."""
    write(tmp_path, 1)
    (tmp_path / "checkpoint-1" / STATE_FILE).write_text("of another run")
    write(tmp_path, 1)
    assert_whole(find_checkpoint(LATEST, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the checkpoints of updates 1 and 2."""
    directory = tmp_path_factory.mktemp("two")
    write(directory, 1)
    write(directory, 2)
    return directory


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), how=st.sampled_from(("cut", "flip", "remove")), where=st.floats(0, 0.999))
def test_a_broken_checkpoint_is_named_and_the_one_before_it_is_used(
    two: Path, caplog: pytest.LogCaptureFixture, name: str, how: str, where: float
) -> None:
    file = two / "checkpoint-2" / name
    content = file.read_bytes()
    place = int(where * len(content))
    damaged = bytearray(content)
    damaged[place] ^= 1
    caplog.clear()
    try:
        if how == "remove":
            file.unlink()
        else:
            file.write_bytes(content[:place] if how == "cut" else damaged)
        assert find_checkpoint(LATEST, two).state.step == 1
        with pytest.raises(UsageError, match="cannot be used"):
            find_checkpoint(str(file.parent), two)
    finally:
        file.write_bytes(content)
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert "checkpoint-2: the checkpoint cannot be used" in warning
    assert find_checkpoint(LATEST, two).state.step == 2


def test_a_checkpoint_of_another_version_is_named_as_such(tmp_path: Path) -> None:
    write(tmp_path, 1)
    state = tmp_path / "checkpoint-1" / STATE_FILE
    before = hashlib.sha256(state.read_bytes()).hexdigest()
    state.write_text(state.read_text().replace('"format": 5', '"format": 4'))
    sums = tmp_path / "checkpoint-1" / SUMS_FILE
    sums.write_text(sums.read_text().replace(before, hashlib.sha256(state.read_bytes()).hexdigest()))
    with pytest.raises(UsageError, match=r"cannot be used: trainer_state.json: format: Input should be 5"):
        find_checkpoint(LATEST, tmp_path)


def test_the_sums_are_those_of_sha256sum(two: Path) -> None:
    subprocess.run(
        ["sha256sum", "--check", "--strict", SUMS_FILE],
        cwd=two / "checkpoint-2",
        check=True,
        capture_output=True,
    )


def replace_one(directory: Path) -> None:
    """What a run does that keeps two checkpoints."""
    write(directory, 3)
    remove_checkpoint(directory, 1)
