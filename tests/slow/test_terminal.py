"""Jobs in a real terminal (tmux): progress, Ctrl-C, a terminal that is closed, and a log that is followed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import pytest
from safetensors.torch import load_file

from hetrain import jobs
from hetrain.jobs import Status
from tests.harness.processes import HANDBOOK, HETRAIN, broker_with_worker, hetrain
from tests.harness.waiting import eventually

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")

T = TypeVar("T")
ENDLESS = "--micro-batch-tokens 256 --batch-tokens 256 --max-length 64 --max-steps 100000"


class Terminal:
    """A terminal with a shell, on a tmux server of its own."""

    def __init__(self, directory: Path) -> None:
        # A server that is ending still answers at its socket, so each has one of its own.
        self._socket = directory / f"tmux-{uuid4().hex[:8]}"
        self._tmux(
            "-f", os.devnull, "new-session", "-d", "-x", "200", "-y", "40", "bash", "--norc", "--noprofile"
        )

    def type(self, line: str) -> None:
        """Types a command and the Enter key."""
        self._tmux("send-keys", "-l", line)
        self._tmux("send-keys", "Enter")

    def press(self, key: str) -> None:
        """Presses a key, as tmux calls it."""
        self._tmux("send-keys", key)

    def await_text(self, pattern: str) -> str:
        """Waits until the screen has a match. Returns it."""
        return self.wait_for(lambda: re.search(pattern, self._screen()), pattern)[0]

    def wait_for(self, condition: Callable[[], T | None], what: str) -> T:
        """Waits for a true value. The error has the screen."""
        try:
            return eventually(condition, 300, interval_s=0.2, what=what)  # type: ignore[return-value]
        except AssertionError as error:
            raise AssertionError(f"{error}; the screen:\n{self._screen()}") from error

    def close(self) -> None:
        """Closes the window, as a user does."""
        self._tmux("kill-server", check=False)

    def _screen(self) -> str:
        """With what has left it, and lines joined where they were wrapped."""
        return self._tmux("capture-pane", "-p", "-J", "-S", "-")

    def _tmux(self, *arguments: str, check: bool = True) -> str:
        command = ["tmux", "-S", str(self._socket), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout


@pytest.fixture
def place(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for terminals and jobs, which find a broker with a worker."""
    monkeypatch.setenv("HETRAIN_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    with broker_with_worker(tiny_llama, threads=1) as broker:
        monkeypatch.setenv("HETRAIN_BROKER_URL", broker.url)
        yield tmp_path
        # What a failed test leaves.
        for socket in tmp_path.glob("tmux-*"):
            subprocess.run(["tmux", "-S", socket, "kill-server"], capture_output=True)
        for job in jobs.list_jobs():
            if not job.status.is_over:
                os.kill(job.pid, signal.SIGKILL)


def test_a_job_and_its_terminals(tiny_llama: Path, place: Path) -> None:
    out, program = place / "out", shlex.join(HETRAIN)

    def await_step(step: int) -> None:
        def reached() -> bool:
            job = jobs.status(out)
            return job.status is Status.RUNNING and (job.step or 0) >= step

        terminal.wait_for(reached, f"update {step}")

    def await_status(status: Status) -> jobs.JobStatus:
        eventually(lambda: jobs.status(out).status is status, 300, what=status)
        return jobs.status(out)

    # Progress, and Ctrl-C once.
    terminal = Terminal(place)
    terminal.type(f"{program} submit {HANDBOOK} -m {tiny_llama} -o {out} {ENDLESS}; echo code=$?")
    terminal.await_text(r"loss \d")
    terminal.press("C-c")
    terminal.await_text("finishing the updates that have begun")
    assert "checkpoint-" in terminal.await_text(r"error: .*\n(.*\n)*code=130")
    job = await_status(Status.INTERRUPTED)
    assert (out / f"checkpoint-{job.step}").is_dir()

    # The end of the terminal stops a job in its foreground.
    terminal.type(f"{program} resume {job.id}")
    await_step((job.step or 0) + 2)
    terminal.close()
    job = await_status(Status.INTERRUPTED)
    assert (out / f"checkpoint-{job.step}").is_dir()
    assert load_file(out / "adapter_model.safetensors")

    # One that is detached goes on, and another terminal follows it.
    terminal = Terminal(place)
    terminal.type(f"{program} resume {job.id[:5]} --detach; echo code=$?")
    terminal.await_text("code=0")
    terminal.close()
    terminal = Terminal(place)
    terminal.type(f"{program} logs -f {job.id}; echo code=$?")
    terminal.await_text(f"job {job.id} runs in process")
    terminal.press("C-c")
    terminal.await_text(r"The job goes on(.*\n)*code=130")
    terminal.close()
    assert jobs.status(out).status is Status.RUNNING
    assert hetrain("cancel", job.id, "--now", environment=os.environ).returncode == 0
    assert hetrain("wait", job.id, environment=os.environ).returncode == 130


def test_a_detached_job_that_cannot_start_says_why(tiny_llama: Path, place: Path) -> None:
    out = place / "out"
    job = (
        "submit",
        HANDBOOK,
        "-m",
        tiny_llama,
        "-o",
        out,
        "--broker-url",
        "redis://127.0.0.1:1/0",
        "--detach",
    )
    done = hetrain(*job, environment=os.environ)
    assert (done.returncode, done.stdout) == (7, "")
    assert "127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in hetrain("--debug", *job, "--overwrite-output-dir", environment=os.environ).stderr
    assert jobs.status(out).status is Status.FAILED
    assert "127.0.0.1:1" in jobs.status(out).error
