"""`hetrain doctor`: its report on real brokers and workers, and on answers that must not be trusted."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from safetensors.torch import load_file, save_file

import hetrain
import worker_gpu.engines
from cli.doctor import doctor
from hetrain.inspection.doctor import diagnose
from hetrain.inspection.probe import probe_workers
from hetrain.public.broker.connection import parse_broker_url
from hetrain.public.errors import BrokerUnreachable, ModelError, NoWorker, WireError
from hetrain.public.protocol.messages import CONTROL_REPORT, VERSION, EngineReport, WorkerReport
from hetrain.secret.engine import ENGINES
from hetrain.secret.engines.rlwe.ring_kernels import ring_kernels
from tasks.supervisor.server import start_worker, stop
from tasks.supervisor.worker_process import spawn_worker
from tests.harness.hub import hub_with
from tests.harness.processes import broker_server, connect
from tests.harness.processes import hetrain as hetrain_command

OTHER = WorkerReport(
    worker="other@elsewhere",
    hostname="elsewhere",
    hetrain="0.0.9",
    device="cpu · int8 kernel",
    engines=[EngineReport(name="rlwe", state="opening")],
    models=[],
    queues=["gpu"],
    concurrency=2,
)


@pytest.fixture(scope="module")
def empty() -> Iterator[str]:
    """A broker without workers."""
    with broker_server() as broker:
        yield broker.url


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Path]]:
    """A broker with a worker that has answered once, and the worker's log."""
    with broker_server() as broker, (broker.directory / "worker.log").open("wb") as log:
        url = broker.url
        worker = start_worker(1, url, "smollm2-135m", log)
        try:
            assert probe_workers(url, first_s=60, settle_s=30, expected=1).workers
            yield url, broker.directory / "worker.log"
        finally:
            stop([worker])


@contextmanager
def answering(url: str, answer: Callable[[], Any], name: str = "other@elsewhere") -> Iterator[None]:
    """A node on the broker that answers the control command with what `answer` returns."""
    app = Celery(broker=parse_broker_url(url).for_celery(), set_as_current=False)
    listening, done = threading.Event(), threading.Event()

    def listen() -> None:
        with app.connection_for_read() as connection:
            handlers = {CONTROL_REPORT: lambda state: answer()}
            mailbox = app.control.mailbox(connection)
            node = mailbox.Node(name, channel=connection.default_channel, handlers=handlers)
            with node.listen():
                listening.set()
                while not done.is_set():
                    try:
                        connection.drain_events(timeout=0.1)
                    except TimeoutError:
                        continue

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        assert listening.wait(20)
        yield
    finally:
        done.set()
        thread.join()
        app.close()


def test_worker_device_and_engines_are_named(
    served: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    url, log = served
    doctor(url, as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["failure"] is None
    assert report["warnings"] == []
    assert report["client"]["versions"]["hetrain"] == hetrain.__version__
    assert [half["name"] for half in report["client"]["engines"]] == list(ENGINES)
    assert report["client"]["kernels"] == ring_kernels().name
    assert report["broker"]["maxmemory"] == 2 << 30
    assert report["broker"]["policy"] == "noeviction"
    assert report["broker"]["server"].startswith("valkey ")
    assert report["broker"]["round_trip_ms"] > 0
    (worker,) = report["workers"]
    assert worker["worker"].startswith("hetrain-1@")
    assert worker["models"] == ["smollm2-135m"]
    assert worker["concurrency"] == 1
    assert f"hetrain worker: {worker['device']}, broker" in log.read_text()
    engines = {engine["name"]: engine for engine in worker["engines"]}
    assert engines.keys() == worker_gpu.engines.ENGINES.keys()
    assert engines["rlwe"] == {"name": "rlwe", "state": "ready", "description": worker["device"]}
    assert all(engine["description"] for engine in engines.values())
    assert {"rlwe", "clear"} <= set(report["runnable"])

    doctor(url)
    text = " ".join(capsys.readouterr().out.split())
    for part in (worker["worker"], worker["hostname"], f"computes on {worker['device']}", "noeviction"):
        assert part in text
    assert all(engine in text for engine in engines)
    assert "clear (hides nothing)" in text
    assert not list(connect(url).scan_iter("hetrain:*:*"))


def test_no_worker_and_a_careless_broker_are_said() -> None:
    with broker_server() as broker:
        broker.connect().config_set("maxmemory", 0)
        broker.connect().config_set("maxmemory-policy", "allkeys-lru")
        result = hetrain_command("doctor", "--broker-url", broker.url, timeout=120)
    assert result.returncode == 8, result.stderr
    assert "celery -A tasks worker -Q gpu" in " ".join(result.stderr.split())
    text = " ".join(result.stdout.split())
    assert "warning: the broker has no maxmemory" in text
    assert "allkeys-lru" in text


def test_a_broker_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BrokerUnreachable, match=r"127\.0\.0\.1:1") as caught:
        doctor("redis://:hunter2@127.0.0.1:1/0", as_json=True)
    assert caught.value.exit_code == 7
    printed = capsys.readouterr().out
    report = json.loads(printed)
    assert report["broker"] is None
    assert report["failure"]["error"] == "BrokerUnreachable"
    assert report["client"]["cores"] >= 1
    assert "hunter2" not in printed


def test_hostile_answers_are_refused_and_others_count(
    served: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    url, _ = served
    answers = {
        "failing@elsewhere": {"error": "KeyError()"},
        "odd@elsewhere": ["\x1b[2J", {"version": VERSION}],
        "loud@elsewhere": OTHER.model_dump() | {"device": "\x1b[2Jcuda"},
        "typed@elsewhere": OTHER.model_dump() | {"models": [{"__type__": "decimal", "__value__": "1"}]},
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(answering(url, partial(deepcopy, answer), name))
        doctor(url)
    text = " ".join(capsys.readouterr().out.split())
    assert "hetrain-1@" in text
    for name in answers:
        assert f"warning: a worker's answer was refused: worker {name}" in text
    assert "\x1b" not in text


def test_bytes_that_are_no_message_are_refused(empty: str) -> None:
    broker = connect(empty)

    def spoil() -> None:
        for binding in broker.smembers("_kombu.binding.reply.celery.pidbox"):
            broker.lpush(binding.split(b"\x06\x16")[-1], b"\xff{")

    with answering(empty, spoil):
        found = diagnose(empty)
    assert isinstance(found.failure, WireError)
    assert found.workers == ()
    assert any("is no message" in warning for warning in found.warnings)


def test_another_version_is_a_warning_and_a_slow_engine_is_waited_for(empty: str) -> None:
    ready = [EngineReport(name="rlwe", state="ready", description="cpu")]
    answers = iter([OTHER, OTHER.model_copy(update={"engines": ready})])
    with answering(empty, lambda: next(answers).model_dump()):
        found = diagnose(empty)
    assert found.failure is None
    assert [half.name for half in found.runnable] == ["rlwe"]
    assert len(found.workers) == 1
    (warning,) = found.warnings
    assert "0.0.9" in warning
    assert hetrain.__version__ in warning


def test_a_model_is_said_to_run_where_a_worker_has_it(
    served: tuple[str, Path], tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, _ = served
    doctor(url, model="smollm2-135m")
    text = " ".join(capsys.readouterr().out.split())
    assert "a job on smollm2-135m can run with rlwe" in text
    with pytest.raises(NoWorker, match="no worker serves 'tiny-llama', only: smollm2-135m"):
        doctor(url, as_json=True, model=str(tiny_llama))
    assert json.loads(capsys.readouterr().out)["runnable"] == []
    broken = shutil.copytree(tiny_llama, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "layers.1.mlp.up" not in name},
        broken / "model.safetensors",
        metadata={"format": "pt"},
    )
    found = diagnose(url, str(broken))
    assert isinstance(found.failure, ModelError)
    assert "layers.1.mlp.up_proj" in str(found.failure)


def test_a_worker_without_its_model_does_not_call_itself_ready(tmp_path: Path, tiny_llama: Path) -> None:
    missing = tmp_path / "missing"
    with broker_server() as broker, (tmp_path / "log").open("wb") as log:
        worker = start_worker(1, broker.url, str(missing), log)
        assert worker.wait(60) == os.EX_CONFIG
        assert str(missing) in (tmp_path / "log").read_text()
        both = {"HETRAIN_BROKER_URL": broker.url, "HETRAIN_MODELS": f"{missing},{tiny_llama}"}
        worker = spawn_worker("partial", both, log)
        try:
            (found,) = probe_workers(broker.url, first_s=60, settle_s=30, expected=1).workers
        finally:
            stop([worker])
    assert found.models == ["tiny-llama"]


def test_a_worker_is_started_again_unless_what_it_lacks_will_never_be_there(tmp_path: Path) -> None:
    model = {"HETRAIN_MODELS": "owner/model", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub")}
    with broker_server() as broker, hub_with("owner/rows", {}) as hub, (tmp_path / "log").open("wb") as log:
        for endpoint, status in ((hub, os.EX_CONFIG), ("http://127.0.0.1:1", 1)):
            settings = {"HETRAIN_BROKER_URL": broker.url, "HF_ENDPOINT": endpoint, **model}
            assert spawn_worker("lacking", settings, log).wait(90) == status
    assert "ModelUnreachable: HETRAIN_MODELS: none of the models" in (tmp_path / "log").read_text()
