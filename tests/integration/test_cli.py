"""The command line as users meet it: from data set to adapter, and every way in which it can go wrong."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
import redis
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from tasks.supervisor.server import start_worker, stop
from tests.harness.processes import HANDBOOK, HETRAIN, broker_server, connect, hetrain
from tests.harness.waiting import eventually

SMALL = ("--micro-batch-tokens", "256", "--max-length", "64")
ONE_EACH = (*SMALL, "--batch-tokens", "256")


def message(result: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in result.stderr, result.stderr
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    """A broker without workers."""
    with broker_server() as server:
        yield server.url


def test_from_data_set_to_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = (
        "--model-name-or-path",
        tiny_llama,
        "--output-dir",
        output,
        "--max-steps",
        4,
        "--json",
        *ONE_EACH,
    )
    command = [*HETRAIN, "submit", HANDBOOK, *arguments, "--lora-dropout", "0.1"]
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    events = [json.loads(line) for line in result.stdout.splitlines()]
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    kinds = [event.pop("event") for event in events]
    hints = kinds.count("hint")
    assert kinds == ["hint"] * hints + ["micro_batch"] * 4 + ["done"]
    assert [event["done"] for event in events[:hints]] == list(range(hints))
    assert events[hints : hints + 4] == records
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert 0 < record["tokens"] <= 256
        # 2 layers, no dx below the first q, k, v: every value up takes 3 bytes, in rings of 256 slots.
        operands = 2 * (64 + 64 + 64 + 96) + 2 * (64 + 192 + 64) + 128
        assert record["bytes_up"] == operands * 256 * 3
        assert (
            min(record[part] for part in ("encrypt_s", "wait_s", "decrypt_s", "server_s", "bytes_down")) > 0
        )
        assert record["encrypt_s"] + record["wait_s"] + record["decrypt_s"] < record["seconds"]
    job = json.loads((output / "job.json").read_text())
    assert (job["status"], job["steps"], job["engine"]) == ("done", 4, "rlwe")
    assert [record["devices"] for record in records] == [[job["worker"]["device"]]] * 4
    assert len(job["plan_digest"]) == 64

    stock = AutoModelForCausalLM.from_pretrained(tiny_llama)
    adapted = PeftModel.from_pretrained(stock, str(output))
    assert any(
        parameter.abs().max() > 0 for name, parameter in adapted.named_parameters() if "lora_B" in name
    )

    again = hetrain("submit", HANDBOOK, *arguments)
    assert again.returncode == 2
    assert "--overwrite-output-dir" in message(again)
    losses = [
        json.loads(hetrain("eval", HANDBOOK, "-m", tiny_llama, "--json", *SMALL, *options).stdout)["loss"]
        for options in ((), ("--adapter", output), ("--adapter", output, "--engine", "clear"))
    ]
    assert losses[1] < losses[0]
    assert losses[1] == pytest.approx(losses[2], rel=1e-3)


def test_plan_says_what_would_leave(tiny_llama: Path) -> None:
    plan = json.loads(hetrain("plan", tiny_llama, "--json").stdout)
    assert [len(group["group"]["members"]) for group in plan["groups"]] == [3, 1, 2, 1] * 2
    assert plan["groups"][2]["forward_bytes"] == 3 * 64 + 112 * 192 // 64
    assert (plan["update"]["micro_batches"], plan["course"]) == (2, None)
    job = ("--dataset", HANDBOOK, "--batch-tokens", 512, "--num-train-epochs", 2, "--max-staleness", 1)
    course = json.loads(hetrain("plan", tiny_llama, "--json", *job).stdout)["course"]
    assert course["rows"] == len(HANDBOOK.read_text().splitlines())
    assert course["tokens"] == 2 * course["epoch_tokens"]
    assert 0.9 * course["row_tokens"] < course["epoch_tokens"] < 0.95 * course["row_tokens"]  # "Question:"
    assert course["updates"] == pytest.approx(course["tokens"] / 512, rel=0.15)
    text = hetrain("plan", tiny_llama, *job)
    assert text.returncode == 0
    said = " ".join(text.stdout.split())
    assert "tiny-llama" in said
    assert "up to 512 tokens in one micro-batch, 2 under way at once" in said
    assert f"{course['updates']} updates over about {course['tokens']} tokens" in said
    assert "Warning: " in said
    assert "--max-staleness 0" in said


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--broker-url", "redis://:hunter2@127.0.0.1:1/0"), 7, "127.0.0.1:1"),
        (("--model-name-or-path", "/nowhere/at all"), 4, "/nowhere/at all"),
        (("--learning-rate", "0"), 2, "--learning-rate"),
        (("--max-length", "512"), 2, "--max-length"),
        (("--lora-target-modules", "nonsense"), 2, "--lora-target-modules"),
        (("--lora-target-modules", "q_proj,nonsense"), 2, "no module 'nonsense'"),
        (("--device", "warp"), 2, "--device"),
    ],
)
def test_what_cannot_work_is_said_at_once(
    tiny_llama: Path, tmp_path: Path, arguments: Sequence[str], code: int, says: str
) -> None:
    defaults = ("-m", tiny_llama, "-o", tmp_path / "out", *ONE_EACH, "--max-steps", 1)
    result = hetrain("submit", HANDBOOK, *defaults, *arguments)
    assert result.returncode == code, result.stderr
    assert says in message(result)
    assert "hunter2" not in result.stderr


def test_a_bad_row_is_named_before_anything_starts(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "fine"}\n{"text": "fine", "txet": 1}\n')
    result = hetrain("submit", data, "-o", tmp_path / "out", "--strict")
    assert result.returncode == 3
    assert "rows.jsonl:2" in message(result)
    assert "preparing" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_worker_with_other_weights_is_refused_by_name(
    tiny_llama: Path, tmp_path: Path, broker: str
) -> None:
    other = tmp_path / "tiny-llama"
    shutil.copytree(tiny_llama, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] += 1.0
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with (tmp_path / "log").open("wb") as log:
        worker = start_worker(1, broker, str(other), log)
        try:
            common = ("--broker-url", broker, "-o", tmp_path / "out", *ONE_EACH)
            result = hetrain("submit", HANDBOOK, "-m", tiny_llama, *common)
            assert result.returncode == 8
            assert "model.layers.1.mlp.down_proj" in message(result)
            unknown = hetrain("submit", HANDBOOK, "-m", "smollm2-135m", *common)
            assert unknown.returncode == 8
            assert "does not serve model 'smollm2-135m'" in message(unknown)
        finally:
            stop([worker])
    assert not list(connect(broker).scan_iter("hetrain:*"))


def fill_but(url: str, room: int) -> None:
    """Fills a broker up to its limit, but for about `room` bytes."""
    ballast = connect(url)
    with suppress(redis.exceptions.OutOfMemoryError):
        for index in range(1000):
            ballast.set(f"ballast:{index}", bytes(100_000))
    assert 0 < ballast.dbsize() < 1000
    for index in range(-(-room // 100_000)):
        ballast.delete(f"ballast:{index}")


@pytest.fixture
def wide_llama(tiny_llama: Path, tmp_path: Path) -> Path:
    """One layer, as wide as SmolLM2's."""
    directory = tmp_path / "wide-llama"
    shutil.copytree(tiny_llama, directory)
    config = AutoConfig.from_pretrained(tiny_llama)
    config.hidden_size, config.num_hidden_layers, config.head_dim = 576, 1, 64
    config.num_attention_heads, config.num_key_value_heads = 9, 3
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def test_a_full_broker_is_said(wide_llama: Path, tmp_path: Path) -> None:
    with broker_server(maxmemory=16 << 20) as full, ExitStack() as stack:
        worker = start_worker(1, full.url, str(wide_llama), full.log)
        stack.callback(stop, [worker])
        fill_but(full.url, 3_000_000)  # room for connections, messages and plan, but not for 576·2048·3 bytes
        result = hetrain(
            "submit", HANDBOOK, "-m", wide_llama, "--broker-url", full.url, "-o", tmp_path / "out",
            "--engine", "clear",
        )  # fmt: skip
    assert result.returncode == 7
    assert "memory" in message(result)


@pytest.mark.parametrize(("place", "presses"), [("embedded", 1), ("broker", 2)])
def test_ctrl_c_keeps_the_adapter_and_leaves_nothing_behind(
    tiny_llama: Path, tmp_path: Path, broker: str, place: str, presses: int
) -> None:
    output = tmp_path / "out"
    with ExitStack() as stack:
        extra: list[str] = []
        if place == "broker":
            log = stack.enter_context((tmp_path / "log").open("wb"))
            worker = start_worker(1, broker, str(tiny_llama), log)
            stack.callback(stop, [worker])
            extra = ["--broker-url", broker]
        command = [
            *HETRAIN,
            "submit",
            str(HANDBOOK),
            "-m",
            str(tiny_llama),
            "-o",
            str(output),
            *ONE_EACH,
            *extra,
        ]
        client = subprocess.Popen(
            [*command, "--max-steps", "100000"],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A shell has its background jobs ignore Ctrl-C; these tests may be one.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        stack.callback(client.kill)
        metrics = output / "metrics.jsonl"

        def has_trained() -> bool:
            assert client.poll() is None
            return metrics.exists() and metrics.read_text().count("\n") >= 3

        eventually(has_trained, 120)
        family = psutil.Process(client.pid).children(recursive=True)
        for _ in range(presses):
            os.killpg(client.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
            time.sleep(0.05)
        _, errors = client.communicate(timeout=60)
        assert client.returncode == 130, errors
        assert "Traceback" not in errors
        assert "the adapter as it stood was written, and checkpoint-" in " ".join(errors.split())
        assert "--resume-from-checkpoint latest" in " ".join(errors.split())
        assert presses > 1 or "finishing the updates that have begun" in errors
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive
        if place == "broker":
            keys = connect(broker)
            left = [key for key in keys.scan_iter("hetrain:*") if keys.ttl(key) < 0]
            assert not left
    assert torch.isfinite(next(iter(load_file(output / "adapter_model.safetensors").values()))).all()
    job = json.loads((output / "job.json").read_text())
    assert job["status"] == "interrupted"
    assert (output / f"checkpoint-{job['steps']}" / "trainer_state.json").exists()


def test_the_end_of_a_terminal_stops_a_run_which_leaves_nothing_behind(
    tiny_llama: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = [
        *HETRAIN,
        "submit",
        HANDBOOK,
        "-m",
        tiny_llama,
        "-o",
        output,
        *ONE_EACH,
        "--max-steps",
        100_000,
    ]
    terminal, stream = os.openpty()
    with tempfile.TemporaryDirectory(dir="/tmp") as scratch, ExitStack() as stack:
        client = subprocess.Popen(
            [str(word) for word in command],
            stdin=stream,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            env=os.environ | {"TMPDIR": scratch},
            preexec_fn=lambda: fcntl.ioctl(stream, termios.TIOCSCTTY, 0),
        )
        stack.callback(client.kill)
        os.close(stream)
        metrics = output / "metrics.jsonl"

        def has_trained() -> bool:
            assert client.poll() is None
            while select.select([terminal], [], [], 0)[0]:
                os.read(terminal, 4096)
            return metrics.exists() and metrics.read_text().count("\n") >= 3

        eventually(has_trained, 120)
        family = psutil.Process(client.pid).children(recursive=True)
        os.close(terminal)
        assert client.wait(60) == 130
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive
        assert not os.listdir(scratch)
    assert not list(output.glob(".*"))
    job = json.loads((output / "job.json").read_text())
    assert job["status"] == "interrupted"
    assert (output / f"checkpoint-{job['steps']}" / "SHA256SUMS").exists()
    assert load_file(output / "adapter_model.safetensors")
