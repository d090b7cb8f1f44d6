"""Supervised workers of one command: they start, are given up, and end with it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from hetrain.local.launcher import start_embedded
from hetrain.public.errors import WorkerError
from hetrain.public.protocol.plan import Plan
from hetrain.transport.celery_channel import CeleryChannel
from tasks.supervisor.embedded import SupervisedWorker
from tests.harness.waiting import eventually


def test_a_worker_that_cannot_start_is_reported(
    model: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HETRAIN_DEVICE", "no-such-device")
    with start_embedded(str(model), tmp_path / "log") as running:
        channel = CeleryChannel(running.url, health_check=running.failure)
        with pytest.raises(WorkerError, match="cannot start") as caught:
            channel.prepare("tiny", "clear", plan.to_bytes(), plan.digest)
        assert "no-such-device" in caught.value.hint
        channel.close()


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(("script", "starts"), [("", 3), ("import os; os._exit(78)", 1)])
def test_a_worker_that_dies_at_once_is_not_started_for_ever(script: str, starts: int) -> None:
    ready: list[int] = []

    def start(descriptor: int) -> subprocess.Popen[bytes]:
        ready.append(descriptor)
        return subprocess.Popen([sys.executable, "-c", script])

    def ensure_running() -> bool:
        worker.ensure_running()
        return False

    worker = SupervisedWorker(start)
    with pytest.raises(WorkerError, match="start"):
        eventually(ensure_running)
    assert len(ready) == starts


PARENT = """
    import sys, time
    from pathlib import Path
    from hetrain.local.launcher import start_embedded
    with start_embedded(sys.argv[1], Path(sys.argv[2])) as running:
        print(running.url.partition("@")[2], flush=True)
        time.sleep(600)
"""


@pytest.mark.parametrize("victim", ["parent", "supervisor"])
def test_no_process_survives(model: Path, tmp_path: Path, victim: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), str(model), str(tmp_path / "log")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    directory = Path(parent.stdout.readline().strip()).parent
    (only,) = psutil.Process(parent.pid).children()
    eventually(lambda: len(only.children()) == 2)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) >= 3
    os.kill(parent.pid if victim == "parent" else only.pid, signal.SIGKILL)
    try:
        eventually(lambda: not any(map(is_alive, family)), 10)
    finally:
        parent.kill()
        parent.wait()
        shutil.rmtree(directory, ignore_errors=True)


def test_leaving_the_block_ends_everything(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks.py").write_text("raise SystemExit('not this one')")
    before = psutil.Process().children()
    with start_embedded(str(model), tmp_path / "log") as running:
        (own,) = [child for child in psutil.Process().children() if child not in before]
        eventually(lambda: len(own.children()) == 2)
        family = own.children(recursive=True)
        directory = Path(running.url.partition("@")[2]).parent
        assert directory.stat().st_mode & 0o777 == 0o700
        password = running.url.rsplit("@", 1)[0].rsplit(":", 1)[1]
        assert all(password not in " ".join(each.cmdline()) for each in family)
    assert not any(each.is_running() for each in family)
    assert not directory.exists()
    assert password not in (tmp_path / "log").read_text()
