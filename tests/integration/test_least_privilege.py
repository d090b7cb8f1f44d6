"""What a client keeps to itself: its memory, the broker's password, and which code it runs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hetrain import api
from hetrain.inspection.probe import probe_workers
from hetrain.public.broker.connection import plaintext_warning, with_password
from hetrain.public.errors import ModelError, UsageError
from hetrain.public.model.files import resolve
from tasks.supervisor.server import start_worker, stop
from tests.harness.processes import broker_server, hetrain

ROWS = Path(__file__).resolve().parents[1] / "data" / "tiny.jsonl"
PASSWORD = "p@ss:w/rd?"


def test_a_client_that_encrypts_is_not_dumpable(tiny_llama: Path) -> None:
    code = (
        "import ctypes, resource, sys, hetrain\n"
        "batching = hetrain.BatchingConfig(micro_batch_tokens=64, max_length=64, in_flight=1)\n"
        "resource.setrlimit(resource.RLIMIT_CORE, 2 * (resource.getrlimit(resource.RLIMIT_CORE)[1],))\n"
        "for engine in ('clear', 'rlwe'):\n"
        "    hetrain.evaluate(sys.argv[1], model=sys.argv[2], batching=batching,\n"
        "                     outsourcing=hetrain.OutsourcingConfig(engine=engine))\n"
        "    print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))\n"  # PR_GET_DUMPABLE
        "print(resource.getrlimit(resource.RLIMIT_CORE)[0])\n"
    )
    command = [sys.executable, "-c", code, str(ROWS), str(tiny_llama)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.stdout.splitlines() == ["1", "0", "0"], done.stderr


@pytest.mark.parametrize("code", ["modeling_own.py", "config.json", "tokenizer_config.json"])
def test_a_model_with_code_is_refused(tiny_llama: Path, tmp_path: Path, code: str) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    if code.endswith(".py"):
        (model / code).write_text("raise SystemExit('this was run')")
    else:
        config = json.loads((model / code).read_text())
        (model / code).write_text(json.dumps(config | {"auto_map": {"AutoConfig": "own.Config"}}))
    with pytest.raises(ModelError, match="code of its own, which is never run") as caught:
        resolve(str(model))
    assert code in str(caught.value)
    assert str(model) in str(caught.value)


def test_the_password_may_lie_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "password"
    secret.write_text(f"{PASSWORD}\n")
    with broker_server() as broker, (tmp_path / "log").open("wb") as log:
        broker.connect().config_set("requirepass", PASSWORD)
        bare = f"unix://{broker.directory}/broker.sock"
        monkeypatch.delenv("HETRAIN_BROKER_URL", raising=False)
        monkeypatch.setenv("HETRAIN_BROKER_PASSWORD_FILE", str(secret))
        worker = start_worker(1, bare, "smollm2-135m", log)
        try:
            probe_workers(with_password(bare, PASSWORD), first_s=60, settle_s=30, expected=1)
            found = api.doctor(bare)
        finally:
            stop([worker])
        assert found.failure is None
        secret.write_text("")
        failure = api.doctor(bare).failure
        assert isinstance(failure, UsageError)
        assert "HETRAIN_BROKER_PASSWORD_FILE" in str(failure)


@pytest.mark.parametrize(
    ("address", "completed"),
    [
        ("redis://host:1/0", "redis://:p%40@host:1/0"),
        ("rediss://user@host/0?ssl_ca_certs=/ca", "rediss://user:p%40@host/0?ssl_ca_certs=/ca"),
        ("unix:///run/broker.sock", "unix://:p%40@/run/broker.sock"),
        ("redis://:other@host", "redis://:other@host"),
    ],
)
def test_an_address_is_completed(address: str, completed: str) -> None:
    assert with_password(address, "p@") == completed


@pytest.mark.parametrize(
    ("address", "warns"),
    [
        ("redis://:hunter2@192.0.2.7:6379/0", True),
        ("redis://broker.invalid/0", True),
        ("rediss://:hunter2@192.0.2.7:6380/0", False),
        ("redis://localhost", False),
        ("redis://[::1]:6379", False),
        ("redis://127.0.0.1:6379/0", False),
        (f"redis://{socket.gethostname()}", False),
        ("unix:///run/broker.sock", False),
    ],
)
def test_a_password_in_clear_over_a_network_is_warned_about(address: str, warns: bool) -> None:
    warning = plaintext_warning(address)
    assert bool(warning) == warns
    assert "hunter2" not in (warning or "")


def test_a_password_in_the_command_line_is_warned_about() -> None:
    address = "redis://:hunter2@127.0.0.1:1/0"
    done = hetrain("doctor", "--broker-url", address)
    assert done.returncode == 7
    said = " ".join(done.stderr.split())
    assert "HETRAIN_BROKER_PASSWORD_FILE" in said
    assert "hunter2" not in said
    quiet = hetrain("doctor", environment=os.environ | {"HETRAIN_BROKER_URL": address})
    assert "HETRAIN_BROKER_PASSWORD_FILE" not in quiet.stderr
