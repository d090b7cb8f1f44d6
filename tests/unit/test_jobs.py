"""Jobs: the status of each, which one a name means, and starting one in a session of its own."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hetrain
from hetrain import jobs
from hetrain.config import JobSpec, LoraConfig, TrainingConfig, TrainingDataConfig
from hetrain.jobs.files import LOG_FILE, METRICS_FILE, RUN_FILE
from hetrain.jobs.launch import launch
from hetrain.jobs.log import follow
from hetrain.jobs.process import Liveness, ProcessIdentity, judge, liveness, start_of, this_process
from hetrain.jobs.registry import choose
from hetrain.jobs.run import Phase, read_run, recorded_run
from hetrain.jobs.settings import from_json, to_json, without_place
from hetrain.jobs.status import Status, advice_for, status_of
from hetrain.public import errors
from hetrain.public.errors import Interrupted, JobDied, NoWorker, UsageError
from tests.harness.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
PHASES: tuple[Phase, ...] = get_args(Phase)
CODES = sorted({each.exit_code for each in vars(errors).values() if isinstance(each, type)})


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory of the test's own."""
    monkeypatch.setenv("HETRAIN_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def spec_in(directory: Path) -> JobSpec:
    directory.mkdir(parents=True, exist_ok=True)
    return JobSpec(dataset="rows.jsonl", output_dir=directory)


def run_in(directory: Path, *, is_resumed: bool = False) -> str:
    """Records a run that is done. Returns its job's id."""
    with recorded_run(spec_in(directory), is_resumed=is_resumed) as run:
        run.starts()
    return jobs.status(directory).id


def test_every_status() -> None:
    for phase, code, alive in product(PHASES, [None, 0, *CODES], Liveness):
        found = status_of(phase, code, alive)
        if code is not None:  # how it ended counts, not what has become of its process's number
            assert found is {0: Status.DONE, 130: Status.INTERRUPTED}.get(code, Status.FAILED)
        elif alive is Liveness.GONE:
            assert found is Status.DIED
        else:
            assert found.value == phase
        assert found.is_over == (code is not None or alive is Liveness.GONE)


def test_a_process_is_more_than_its_number() -> None:
    process = ProcessIdentity(pid=7, start="boot:100", host="here")
    for host, start in product(("here", "there"), ("boot:100", "boot:200", "later:100", "")):
        expected = Liveness.ALIVE if start == "boot:100" else Liveness.GONE
        assert judge(process, host, start) is (expected if host == "here" else Liveness.ELSEWHERE)
    # Nothing is alive that could not say when it began.
    assert judge(replace(process, start=""), "here", "") is Liveness.GONE


def test_processes_of_this_machine() -> None:
    me = this_process()
    assert liveness(me) is Liveness.ALIVE
    assert liveness(replace(me, start="another")) is Liveness.GONE
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    recorded = replace(me, pid=child.pid, start=start_of(child.pid))
    assert liveness(recorded) is Liveness.ALIVE
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert liveness(recorded) is Liveness.GONE  # nobody has reaped it yet
    child.wait()
    assert liveness(recorded) is Liveness.GONE


def test_advice_names_a_command_that_the_status_allows() -> None:
    for status, has_checkpoint in product(Status, (True, False)):
        advice = advice_for(status, "0a", has_checkpoint=has_checkpoint)
        assert ("hetrain resume 0a" in advice) == (status.is_over and status is not Status.DONE)
        assert ("hetrain cancel 0a" in advice) == (not status.is_over)


@given(st.lists(st.text("0123abcdef", min_size=8, max_size=8), unique=True), st.data())
def test_a_name_means_the_one_job_that_it_begins(ids: list[str], data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from(ids) if ids else st.text("0f", max_size=9))
    name = whole[: data.draw(st.integers(0, len(whole)))]
    matches = [each for each in ids if each.startswith(name)] if name else []
    if len(matches) == 1:
        assert choose(name, ids) == matches[0]
    else:
        with pytest.raises(UsageError) as caught:
            choose(name, ids)
        assert all(each in caught.value.what for each in matches)


def test_an_id_that_another_begins_with_is_itself() -> None:
    assert choose("ab", ["ab", "abc"]) == "ab"


def test_settings_survive_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    spec = JobSpec(
        dataset=("rows.jsonl", "owner/rows"),
        data=TrainingDataConfig(eval_dataset="rows.jsonl", completion_only_loss=False),
        model="model",
        output_dir=Path("out"),
        workers="redis://:hunter2@broker",
        lora=LoraConfig(target_modules="q_proj,v_proj"),
        training=TrainingConfig(max_steps=3, learning_rate=1, max_bytes_in_flight=1 << 20),
    )
    assert from_json(json.loads(json.dumps(to_json(spec)))) == spec
    kept = without_place(spec)
    assert kept.dataset == (str(tmp_path / "rows.jsonl"), "owner/rows")
    assert kept.data.eval_dataset == (str(tmp_path / "rows.jsonl"),)
    assert (kept.model, kept.output_dir) == (str(tmp_path / "model"), tmp_path / "out")
    assert "hunter2" not in json.dumps(to_json(kept))
    # Of another version: a setting that is gone, and one that is new.
    older = to_json(spec)
    older["training"]["gone"] = older["training"].pop("seed")
    assert from_json(older) == spec
    for broken in ({"lora": {"r": "many"}}, {"training": {"max_steps": 0}}):
        with pytest.raises((ValueError, UsageError)):
            from_json({"dataset": ["x"], **broken})


@pytest.mark.parametrize(
    ("error", "code", "status", "says"),
    [
        (None, 0, Status.DONE, ""),
        (Interrupted("stopped after 3", hint="go on"), 130, Status.INTERRUPTED, "stopped after 3"),
        (KeyboardInterrupt(), 130, Status.INTERRUPTED, "stopped before the first update"),
        (NoWorker("nobody", hint="start one"), 8, Status.FAILED, "nobody. start one"),
        (ZeroDivisionError("x"), 1, Status.FAILED, "ZeroDivisionError: x"),
    ],
)
@pytest.mark.usefixtures("state")
def test_a_run_records_how_it_ends(
    tmp_path: Path, error: BaseException | None, code: int, status: Status, says: str
) -> None:
    out, started = tmp_path / "out", []
    with (
        pytest.raises(type(error)) if error else nullcontext(),
        recorded_run(spec_in(out), is_resumed=False, on_start=started.append) as run,
    ):
        assert jobs.status(out).status is Status.PREPARING
        run.before(lambda done: started.append(done))("hint")
        run.starts()
        assert jobs.status(out).status is Status.RUNNING
        run.stops(lambda: None)
        assert jobs.status(out).status is Status.STOPPING
        if error:
            raise error
    found = jobs.status(out)
    assert started == [found.id, "hint"]
    assert (found.status, found.exit_code, found.error) == (status, code, says)
    assert found.ended is not None
    assert found.ended >= found.begun


def test_a_job_is_found_by_id_and_directory_and_forgotten_with_it(state: Path, tmp_path: Path) -> None:
    first, second = run_in(tmp_path / "a"), run_in(tmp_path / "b")
    assert {job.id for job in jobs.list_jobs()} == {first, second}
    for name in (first, first[:-1], tmp_path / "a"):
        assert jobs.status(name).output_dir == tmp_path / "a"
    assert jobs.status().id in (first, second)
    assert run_in(tmp_path / "a", is_resumed=True) == first  # the same job
    third = run_in(tmp_path / "a")
    assert {job.id for job in jobs.list_jobs()} == {second, third}
    (tmp_path / "b" / RUN_FILE).unlink()
    assert [job.id for job in jobs.list_jobs()] == [third]
    assert len(list((state / "jobs").iterdir())) == 1
    with pytest.raises(UsageError, match="there is no job"):
        jobs.status(second)
    (tmp_path / "a" / RUN_FILE).write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        jobs.status(third)
    assert jobs.list_jobs() == []
    assert len(list((state / "jobs").iterdir())) == 1  # perhaps of another version


def test_where_nothing_can_be_written_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HETRAIN_STATE", str(tmp_path / "file" / "state"))
    job = run_in(tmp_path / "a")
    assert jobs.status(tmp_path / "a").id == job
    assert jobs.list_jobs() == []
    spec = JobSpec(dataset="rows.jsonl", output_dir=tmp_path / "missing")
    with recorded_run(spec, is_resumed=False) as run:
        run.starts()
    warnings = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert any("set HETRAIN_STATE" in each for each in warnings)
    assert any("run.json cannot be written" in each for each in warnings)


@pytest.mark.usefixtures("state")
def test_progress_is_that_of_the_job_not_of_one_before_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / METRICS_FILE).write_text('{"step": 9, "total_steps": 9, "loss": 1.0}\n')
    (out / LOG_FILE).write_text("of another job")
    os.utime(out / METRICS_FILE, (1e9, 1e9))
    run_in(out)
    found = jobs.status(out)
    assert (found.step, found.log) == (None, None)
    run_in(out, is_resumed=True)
    assert jobs.status(out).step == 9
    lines = '{"step": 1, "total_steps": 5, "loss": null}\n{"step": 2, "half'
    (out / METRICS_FILE).write_text(lines)
    found = jobs.status(out)
    assert (found.step, found.total_steps, found.loss) == (1, 5, None)
    assert b"".join(jobs.read_metrics(out)).decode() == lines
    with pytest.raises(UsageError, match=r"no job\.log"):
        jobs.read_log(out)


def test_a_log_is_followed_to_its_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    steps = iter(
        [
            lambda: None,  # it is not there yet
            lambda: log.write_bytes(b"one\n"),
            lambda: log.write_bytes(b"one\ntwo\n"),
            lambda: log.write_bytes(b"cut"),  # replaced: what is new counts from its end on
            lambda: log.write_bytes(b"cut, then more"),
        ]
    )
    is_over = [False]

    def pause() -> None:
        step = next(steps, None)
        if step:
            step()
        else:
            is_over[0] = True

    assert b"".join(follow(log, lambda: is_over[0], pause)) == b"one\ntwo\n, then more"
    assert b"".join(follow(log, lambda: True)) == b"cut, then more"
    assert b"".join(follow(tmp_path / "none", lambda: True)) == b""


@pytest.mark.usefixtures("state")
def test_what_cannot_be_resumed_or_cancelled_says_why(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def failed(spec: JobSpec) -> str:
        with pytest.raises(NoWorker), recorded_run(spec, is_resumed=False):
            raise NoWorker("nobody")
        return jobs.status(out).id

    spec = spec_in(out)
    job = failed(spec)
    assert jobs.to_resume(job) == without_place(spec)
    (out / "checkpoint-3").mkdir()
    assert jobs.to_resume(job[:4], workers="redis://b") == replace(
        without_place(spec), workers="redis://b", resume_from_checkpoint="latest"
    )
    with pytest.raises(UsageError, match=r"the job is over: failed.*hetrain resume"):
        jobs.cancel(job)
    assert jobs.wait(job).status is Status.FAILED
    job = failed(replace(spec, workers="redis://:hunter2@broker"))
    assert "hunter2" not in (out / RUN_FILE).read_text()
    with pytest.raises(UsageError, match=r"whose address is not kept.*HETRAIN_BROKER_URL"):
        jobs.to_resume(job)
    job = failed(replace(spec, dataset="-"))
    with pytest.raises(UsageError, match="standard input"):
        jobs.to_resume(job)
    with recorded_run(spec, is_resumed=False):
        with pytest.raises(UsageError, match="the job is preparing"):
            jobs.to_resume(out)
        run = read_run(out)
        assert run is not None
        there = run.model_copy(update={"process": replace(run.process, host="elsewhere")})
        (out / RUN_FILE).write_text(there.model_dump_json())
        with pytest.raises(UsageError, match=r"runs on elsewhere.*stop it there"):
            jobs.cancel(out)
    with pytest.raises(UsageError, match="the job is done"):
        jobs.to_resume(out)


CHILD = """
import os, sys
from hetrain.jobs import Launcher
launcher = Launcher(int(sys.argv[-1]))
assert launcher.spec.workers == "redis://:hunter2@broker" and "hunter2" not in str(sys.argv)
if os.path.exists("fail"):
    sys.exit(7)
if os.path.exists("die"):
    os.kill(os.getpid(), 9)
launcher.started("0123abcd")
print(os.getsid(0) == os.getpid(), os.environ["MINE"], os.isatty(0), flush=True)
print("error", file=sys.stderr)
open("done", "w").close()
"""


def test_a_detached_process_has_its_own_session_and_its_output_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINE", "inherited")
    spec = replace(spec_in(tmp_path / "out"), workers="redis://:hunter2@broker")
    command = [sys.executable, "-c", CHILD, str(spec.output_dir)]
    assert launch(spec, command) == jobs.Launch("0123abcd")
    log = b"".join(follow(tmp_path / "out" / LOG_FILE, (tmp_path / "done").exists))
    assert re.fullmatch(rb"20.*: job 0123abcd runs in process \d+\nTrue inherited False\nerror\n", log)
    (tmp_path / "done").unlink()
    (tmp_path / "out" / LOG_FILE).unlink()
    (tmp_path / "out" / LOG_FILE).symlink_to("/dev/full")  # a disk without room costs the log, not the job
    assert launch(spec, command) == jobs.Launch("0123abcd")
    eventually((tmp_path / "done").exists)
    (tmp_path / "fail").touch()
    assert launch(spec, command) == jobs.Launch("", 7)
    (tmp_path / "fail").rename(tmp_path / "die")
    with pytest.raises(JobDied, match=f"signal {signal.SIGKILL.value}"):
        launch(spec, command)


JOB = "ID OF THE JOB"


def completing(words: str, number: int) -> dict[str, str]:
    """The variables with which bash asks for completions of a word."""
    return {"COMP_WORDS": words, "COMP_CWORD": str(number), "_HETRAIN_COMPLETE": "complete_bash"}


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (("list",), {}, JOB),
        (("resume", "--help"), {}, "--detach"),
        ((), completing("hetrain wait ", 2), JOB),
        ((), {"_HETRAIN_COMPLETE": "source_bash"}, "complete -o default -F _hetrain_completion hetrain"),
    ],
)
def test_commands_on_jobs_and_completion_need_no_torch(
    arguments: tuple[str, ...],
    environment: dict[str, str],
    says: str,
    state: Path,
    tmp_path: Path,
) -> None:
    job = run_in(tmp_path / "out")
    program = (
        "import sys\nsys.argv[0] = 'hetrain'\nfrom cli.main import main\ntry:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'pyarrow', 'datasets'} & set(sys.modules)\n"
        "    sys.exit(f'imported {heavy}') if heavy else None\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert result.returncode == 0, result.stderr
    assert says.replace(JOB, job) in result.stdout


def test_jobs_are_part_of_the_package() -> None:
    assert hetrain.jobs.list_jobs is jobs.list_jobs
