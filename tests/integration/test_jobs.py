"""Jobs as users meet them: detached, followed, stopped, killed and resumed, with a real broker and worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from hetrain import jobs
from hetrain.jobs import JobStatus, Status
from tests.harness.processes import HANDBOOK, HETRAIN, broker_with_worker, hetrain
from tests.harness.waiting import eventually

SMALL = ("--micro-batch-tokens", "256", "--batch-tokens", "256", "--max-length", "64", "--save-steps", "1")
ENDLESS = (*SMALL, "--max-steps", "100000")
PATIENCE_S = 300


@pytest.fixture(scope="module")
def broker(tiny_llama: Path) -> Iterator[str]:
    """A broker with a worker; its address has a password."""
    with broker_with_worker(tiny_llama, threads=1) as server:
        yield server.url


@pytest.fixture(autouse=True)
def state(tmp_path: Path, broker: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's state directory. Jobs that a failed test has left are killed."""
    directory = tmp_path / "state"
    monkeypatch.setenv("HETRAIN_STATE", str(directory))
    monkeypatch.setenv("HETRAIN_BROKER_URL", broker)
    yield directory
    for job in jobs.list_jobs():
        if not job.status.is_over:
            os.kill(job.pid, signal.SIGKILL)


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """A command that ends with this exit code."""
    done = hetrain(*arguments, environment=os.environ, timeout=600)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def record(*arguments: object, code: int = 0) -> dict[str, object]:
    """What a command says as JSON."""
    found: dict[str, object] = json.loads(run(*arguments, "--json", code=code).stdout)
    return found


def reach(job: str, step: int) -> JobStatus:
    """The job, once it has made this update."""

    def found() -> JobStatus | None:
        now = jobs.status(job)
        assert not now.status.is_over, now
        return now if (now.step or 0) >= step else None

    return eventually(found, PATIENCE_S, what=f"update {step}")  # type: ignore[return-value]


def await_running(job: str, step: int) -> JobStatus:
    """The job, once another process has taken it up and made this update."""
    eventually(lambda: jobs.status(job).status is Status.RUNNING, PATIENCE_S)
    return reach(job, step)


def test_a_job_from_detaching_to_its_last_resumption(tiny_llama: Path, tmp_path: Path, broker: str) -> None:
    out = tmp_path / "out"
    started = record("submit", HANDBOOK, "-m", tiny_llama, "-o", out, *ENDLESS, "--detach")
    job = str(started["id"])
    assert started == {"id": job, "output_dir": str(out), "log": str(out / "job.log")}

    # It has a session of its own, and no secret where others could read it.
    process = psutil.Process(int(str(record("status", job)["pid"])))
    assert os.getsid(process.pid) == process.pid
    assert process.terminal() is None
    password = broker.partition("://:")[2].partition("@")[0]
    assert password
    assert password not in "".join(process.cmdline())

    # Ctrl-C in `logs -f` leaves it running.
    follower = subprocess.Popen(
        [*HETRAIN, "logs", job[:6], "-f"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell has its background jobs ignore Ctrl-C; these tests may be one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert follower.stdout is not None
    assert f"job {job} runs in process {process.pid}" in follower.stdout.readline().decode()
    follower.send_signal(signal.SIGINT)
    _, errors = follower.communicate(timeout=PATIENCE_S)
    assert (follower.returncode, errors.decode().strip()) == (
        130,
        f"The job goes on; `hetrain cancel {job[:6]}` stops it.",
    )
    found = reach(job, 2)
    assert (found.status, found.pid) == (Status.RUNNING, process.pid)
    for file in (out / "run.json", out / "job.json", out / "job.log", *(tmp_path / "state").rglob("*.json")):
        assert password not in file.read_text()
    assert [json.loads(line)["step"] for line in run("logs", job, "--json").stdout.splitlines()][:2] == [1, 2]
    run("resume", job, code=2)

    # Cancelled once, it finishes what has begun.
    run("cancel", job)
    over = record("wait", job, code=130)
    assert (over["status"], over["exit_code"]) == ("interrupted", 130)
    last = int(str(over["step"]))
    assert (out / f"checkpoint-{last}" / "trainer_state.json").exists()
    assert load_file(out / "adapter_model.safetensors")
    run("cancel", job, code=2)

    with ThreadPoolExecutor(1) as pool:
        # Resumed in the foreground it is the same job. Killed, it is shown as died.
        ends = pool.submit(hetrain, "resume", job, environment=os.environ, timeout=600)
        found = await_running(job, last + 2)
        os.kill(found.pid, signal.SIGKILL)
        assert ends.result().returncode == -signal.SIGKILL
        (listed,) = [json.loads(line) for line in run("list", "--json").stdout.splitlines()]
        assert (listed["id"], listed["status"], listed["exit_code"]) == (job, "died", None)
        assert listed["step"] >= last + 2
        assert f"hetrain resume {job}" in run("status").stdout
        assert f"hetrain resume {job}" in run("wait", out, code=11).stderr

        # It goes on all the same, and can be ended at once.
        ends = pool.submit(hetrain, "resume", out, environment=os.environ, timeout=600)
        await_running(job, last + 3)
        run("cancel", job, "--now")
        assert ends.result().returncode == 130
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert (out / f"checkpoint-{len(steps)}" / "SHA256SUMS").exists()
    assert jobs.status(job).status is Status.INTERRUPTED


def test_a_job_of_the_foreground_is_listed_too(tiny_llama: Path, tmp_path: Path) -> None:
    run("submit", HANDBOOK, "-m", tiny_llama, "-o", tmp_path / "out", *SMALL, "--max-steps", 1)
    (job,) = jobs.list_jobs()
    assert (job.status, job.step, job.exit_code) == (Status.DONE, 1, 0)
    assert run("list").stdout.splitlines()[1].split()[:3] == [job.id, "done", "1/1"]
    assert run("wait", job.id).stdout.split()[:2] == [job.id, "done"]
    assert "--json" in run("logs", job.id, code=2).stderr
    assert "is done" in run("resume", job.id, code=2).stderr
    run("submit", HANDBOOK, "-m", tiny_llama, "-o", tmp_path / "other", *SMALL, "--device", "warp", code=2)
    assert [each.status for each in jobs.list_jobs()] == [Status.DONE, Status.FAILED]
    assert "--device" in run("status", tmp_path / "other").stdout
