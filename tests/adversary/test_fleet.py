"""Real workers that lie, beside an honest one and alone: what becomes of a job, and who is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from hetrain.public.protocol.registration import REGISTRY_KEY
from hetrain.transport.requests.decision import MOST_REJECTIONS
from tasks.supervisor.server import stop
from tasks.supervisor.worker_process import spawn_worker
from tests.harness.cli_process import run_forked
from tests.harness.in_flight import broker_client
from tests.harness.processes import broker_server
from tests.harness.waiting import eventually

ROWS = Path(__file__).resolve().parents[1] / "data" / "tiny.jsonl"
LIAR = """
    import itertools
    from worker_gpu.service import Service
    from hetrain.public.protocol.messages import Completion
    from hetrain.public.protocol import keys
    from tasks import evaluate as tasks_evaluate
    from tasks import request_log
    from tasks.app import app

    honest, count = Service.evaluate, itertools.count(1)
    if {kind!r} == "renamed":
        tasks_evaluate._worker_name = lambda task: f"honest-{{next(count)}}@host"

    def end(log, job, completion, parts=None):
        if {kind!r} == "vanishing":
            log._store.client.delete(keys.lease(job, completion.request))
        elif {kind!r} == "missing":
            report = completion.to_json(), 900, 900, int(completion.state == "done")
            log._call(request_log._eval(request_log._END, request_log._keys(job, completion.request), report))
        else:
            honest_end(log, job, completion, parts)

    honest_end, request_log.RequestLog.end = request_log.RequestLog.end, end

    written = Completion.to_json
    announced = {{"oversized": {{"nbytes": 200 << 20}}, "undersized": {{"nbytes": 1}}}}
    announced["foreign"] = {{"job": "f" * 32}}

    def to_json(completion):
        if {kind!r} == "malformed" and completion.state == "done":
            return "{{"
        if {kind!r} == "vague" and completion.state == "done":
            completion = completion.model_copy(update={{"state": "failed", "output": None}})
        if {kind!r} == "nothing":
            completion = completion.model_copy(update={{"output": None}})
        if {kind!r} == "other" and completion.output:
            output = completion.output.model_copy(
                update={{"token": keys.output_token("f" * 32, completion.worker)}}
            )
            completion = completion.model_copy(update={{"request": "f" * 32, "output": output}})
        output = completion.output and completion.output.model_copy(update=announced.get({kind!r}, {{}}))
        return written(completion.model_copy(update={{"output": output}}))

    Completion.to_json = to_json

    def lies(task):
        if {kind!r} == "hints":
            return task.header.get("operand") == "mask_seed"
        return {kind!r} in ("always", "renamed") or ({kind!r} == "sometimes" and next(count) % 10 == 0)

    def evaluate(service, task, load_plan, payload):
        if {kind!r} == "failing":
            raise ValueError("not today")
        parts = [bytearray(part) for part in honest(service, task, load_plan, payload)]
        if {kind!r} == "short":
            del parts[-1][-1]
        if {kind!r} == "empty":
            parts = [bytearray()]
        if {kind!r} == "long":
            parts.append(bytearray(5 << 20))
        if lies(task):
            parts[0][1] ^= 0x40
            parts[0][-2] ^= 0x20
        return [memoryview(part) for part in parts]

    Service.evaluate = evaluate
    app.start(["worker", "-Q", "gpu", "--without-gossip", "--without-mingle", "-n", "liar@host"])
"""


@contextmanager
def fleet(model: Path, kinds: Sequence[str | Path]) -> Iterator[str]:
    """The URL of a broker with a worker of each kind: honest, a liar, or one that serves other files."""
    with broker_server() as served, ExitStack() as stack:
        settings = {
            "HETRAIN_BROKER_URL": served.url,
            "HETRAIN_MODELS": json.dumps([str(model)]),
            "OMP_NUM_THREADS": "1",
        }
        for kind in kinds:
            files = {"HETRAIN_MODELS": json.dumps([str(kind)])} if isinstance(kind, Path) else {}
            worker = (
                spawn_worker("liar" if files else "honest", settings | files, served.log)
                if kind == "honest" or files
                else subprocess.Popen(
                    [sys.executable, "-c", textwrap.dedent(LIAR.format(kind=kind))],
                    env=os.environ | settings,
                    stdout=served.log,
                    stderr=served.log,
                    start_new_session=True,
                )
            )
            stack.callback(stop, [worker], grace_s=0)
        with broker_client(served.url) as client:
            assert eventually(lambda: client.zcard(REGISTRY_KEY) == len(kinds))
        yield served.url


def submit(model: Path, scratch: Path, name: str, *arguments: object) -> CompletedProcess[str]:
    return run_forked(
        ["submit", ROWS, "-m", model, "-o", scratch / name, "--batch-tokens", 64, "--max-length", 64,
         "--learning-rate", 1e-2, *arguments],
        240,
        os.environ | {"HETRAIN_CACHE": str(scratch / f"cache-{name}")},
    )  # fmt: skip


def metrics(scratch: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (scratch / name / "metrics.jsonl").read_text().splitlines()]


RUN = ("--engine", "clear", "--max-steps", 2)


@pytest.fixture(scope="module")
def undisturbed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run on an honest worker."""
    scratch = tmp_path_factory.mktemp("undisturbed")
    with fleet(tiny_llama, ["honest"]) as url:
        done = submit(tiny_llama, scratch, "out", *RUN, "--broker-url", url)
    assert done.returncode == 0, done.stderr
    assert not any(line["rejected"] for line in metrics(scratch, "out"))
    return scratch / "out"


@pytest.mark.parametrize(
    "kind",
    [
        *("always", "sometimes", "short", "empty", "long", "oversized", "undersized", "foreign", "failing"),
        *("nothing", "other", "malformed", "vague", "missing", "vanishing"),
    ],
)
def test_beside_an_honest_worker_a_bad_one_changes_nothing(
    tiny_llama: Path, tmp_path: Path, undisturbed: Path, kind: str
) -> None:
    """Whether it gives wrong results, none of the right size, or none at all."""
    with fleet(tiny_llama, ["honest", kind]) as url:
        disturbed = submit(tiny_llama, tmp_path, "out", *RUN, "--broker-url", url)
    text = " ".join(disturbed.stderr.split())
    assert disturbed.returncode == 0, text
    adapters = [load_file(path / "adapter_model.safetensors") for path in (undisturbed, tmp_path / "out")]
    assert all(adapters[0][name].equal(adapters[1][name]) for name in adapters[0] | adapters[1])
    assert "no result of worker liar@host is accepted any more" in text
    if kind in {"always", "sometimes", "short", "empty"}:  # the others' results are not even downloaded
        lines = metrics(tmp_path, "out")
        assert sum(line["rejected"] for line in lines) > 0
        assert {name for line in lines for name in line["rejected_workers"]} == {"liar@host"}
        assert "| workers rejected | liar@host |" in (tmp_path / "out/README.md").read_text()


def test_beside_a_good_worker_one_with_other_weights_is_passed_over(
    tiny_llama: Path, tmp_path: Path, undisturbed: Path
) -> None:
    other = tmp_path / "other" / tiny_llama.name
    shutil.copytree(tiny_llama, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: -each for name, each in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with fleet(tiny_llama, ["honest", other]) as url:
        done = submit(tiny_llama, tmp_path, "out", *RUN, "--broker-url", url)
    text = " ".join(done.stderr.split())
    assert done.returncode == 0, text
    adapters = [load_file(path / "adapter_model.safetensors") for path in (undisturbed, tmp_path / "out")]
    assert all(adapters[0][name].equal(adapters[1][name]) for name in adapters[0] | adapters[1])
    assert "is passed over: worker liar@" in text


def test_a_liar_with_a_new_name_for_each_answer_ends_the_job(tiny_llama: Path, tmp_path: Path) -> None:
    """Excluding names would let it try one wrong result with every product, until one passes."""
    with fleet(tiny_llama, ["honest", "renamed"]) as url:
        done = submit(tiny_llama, tmp_path, "out", "--engine", "clear", "--max-steps", 9, "--broker-url", url)
    text = " ".join(done.stderr.split())
    assert done.returncode == 8, text
    assert text.count("is accepted any more") == MOST_REJECTIONS
    assert "is wrong; it was not decrypted" in text


def test_a_liar_in_hints_alone_is_named_before_training(tiny_llama: Path, tmp_path: Path) -> None:
    with fleet(tiny_llama, ["honest", "hints"]) as url:
        done = submit(tiny_llama, tmp_path, "out", "--max-steps", 2, "--broker-url", url)
    assert done.returncode == 0, done.stderr
    assert "no result of worker liar@host is accepted any more" in " ".join(done.stderr.split())
    losses = [line["loss"] for line in metrics(tmp_path, "out")]
    with fleet(tiny_llama, ["honest"]) as url:
        clear = submit(
            tiny_llama, tmp_path, "clear", "--max-steps", 2, "--engine", "clear", "--broker-url", url
        )
    assert clear.returncode == 0, clear.stderr
    assert losses == pytest.approx([line["loss"] for line in metrics(tmp_path, "clear")], rel=3e-3)


def test_a_liar_alone_ends_the_job_with_what_was_learned(tiny_llama: Path, tmp_path: Path) -> None:
    """It lies at every tenth product, so the first lie may come before the first update."""
    with fleet(tiny_llama, ["sometimes"]) as url:
        done = submit(tiny_llama, tmp_path, "out", "--engine", "clear", "--max-steps", 4, "--broker-url", url)
        text = " ".join(done.stderr.split())
        assert done.returncode == 8, text
        assert "error: liar@host: the result of" in text
        assert "is wrong; it was not decrypted" in text
    job = json.loads((tmp_path / "out" / "job.json").read_text())
    assert job["status"] == "failed"
    assert (tmp_path / "out" / "adapter_model.safetensors").exists() == (job["steps"] > 0)
