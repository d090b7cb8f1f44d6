"""The Concrete engine beyond what every engine guarantees: real training, and what each side refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hetrain.public.concrete.circuits import CircuitSpec, build_circuit, compile_circuit, tile
from hetrain.public.concrete.package import package_version
from hetrain.public.errors import ParameterError, ResultRejected, WireError, WorkerRefused
from tasks.supervisor.server import start_worker, stop
from tests.harness.engine import EngineHarness
from tests.harness.processes import broker_server, hetrain

ROWS = Path(__file__).resolve().parents[1] / "data" / "tiny.jsonl"


@pytest.fixture(scope="module")
def tiny_model(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, trained from scratch on the first half of the rows until it knows them."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    torch.manual_seed(5)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            tie_word_embeddings=True,
        )
    )
    texts = [json.loads(line)["text"] for line in ROWS.read_text().splitlines()][:4]
    batches = [torch.tensor(tokenizer(text)["input_ids"])[None] for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        losses = [model(input_ids=tokens, labels=tokens).loss for tokens in batches]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    assert max(float(loss.detach()) for loss in losses) < 2
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2_dir / name, directory)
    return directory


def submit(
    model: Path, output: Path, *arguments: object, url: str | None = None
) -> subprocess.CompletedProcess[str]:
    broker = () if url is None else ("--broker-url", url)
    return hetrain(
        "submit", ROWS, "--model-name-or-path", model, "--output-dir", output, "--batch-tokens", 12,
        "--max-length", 12, "--max-steps", 3, "--learning-rate", 1e-2, "--seed", 1,
        *broker, *arguments,
    )  # fmt: skip


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_training_equals_clear_at_8_bits(tiny_model: Path, tmp_path: Path) -> None:
    """Every linear in both directions through the real queue; exact integers leave no difference to see."""
    encrypted, clear = tmp_path / "concrete", tmp_path / "clear"
    result = submit(tiny_model, encrypted, "--engine", "concrete")
    assert result.returncode == 0, result.stderr
    result = submit(tiny_model, clear, "--engine", "clear", "--activation-bits", 8)
    assert result.returncode == 0, result.stderr
    assert len(losses(encrypted)) == 3
    assert losses(encrypted) == pytest.approx(losses(clear), rel=1e-4)
    assert len(set(losses(encrypted))) == 3
    job = json.loads((encrypted / "job.json").read_text())
    assert job["worker"]["device"].startswith(f"concrete {package_version()} · ")
    metrics = [json.loads(line) for line in (encrypted / "metrics.jsonl").read_text().splitlines()]
    assert all(line["bytes_down"] > 500_000 for line in metrics), "these were no Concrete ciphertexts"

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokens = torch.arange(40, 52)[None]
    with torch.no_grad():
        before = base(tokens).logits
        after = PeftModel.from_pretrained(base, str(encrypted)).eval()(tokens).logits
    assert not torch.allclose(before, after, atol=1e-3)


@contextmanager
def worker_without_concrete(model: Path, scratch: Path) -> Iterator[str]:
    """A broker and a worker that cannot import concrete-python."""
    shadow = scratch / "shadow" / "concrete"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'concrete'\")\n")
    with broker_server() as broker, ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(shadow.parent))
            worker = start_worker(1, broker.url, str(model), broker.log)
        stack.callback(stop, [worker])
        yield broker.url


def test_a_worker_without_concrete_serves_rlwe_and_says_why_not_concrete(
    tiny_model: Path, tmp_path: Path
) -> None:
    with worker_without_concrete(tiny_model, tmp_path) as url:
        refused = submit(tiny_model, tmp_path / "concrete", "--engine", "concrete", url=url)
        served = submit(tiny_model, tmp_path / "rlwe", "--engine", "rlwe", url=url)
    text = " ".join(refused.stderr.split())
    assert refused.returncode == 8, text
    assert "this worker cannot serve the concrete engine" in text
    assert "No module named 'concrete'" in text
    assert "Traceback" not in text
    assert not (tmp_path / "concrete" / "adapter_model.safetensors").exists()
    assert served.returncode == 0, served.stderr


@pytest.fixture
def harness(tmp_path: Path) -> EngineHarness:
    weights = {"w": torch.randn(12, 16, generator=torch.Generator().manual_seed(1))}
    return EngineHarness("concrete", weights, tmp_path / "model")


def test_both_sides_must_have_the_same_concrete_and_the_same_circuits(harness: EngineHarness) -> None:
    setup: dict[str, Any] = dict(harness.sealer.setup)
    circuits = setup["circuits"]
    first, second = circuits

    def prepare(changed: dict[str, Any]) -> None:
        harness.channel.prepare(
            harness.plan.model, "concrete", harness.plan.to_bytes(), harness.plan.digest, changed
        )

    wrong = {
        "2.10.0": setup | {"package_version": "2.10.0"},
        first: setup | {"circuits": circuits | {first: "ab" * 32}},
        second: setup | {"circuits": {first: circuits[first]}},
    }
    for named, changed in wrong.items():
        with pytest.raises(WorkerRefused, match=named) as error:
            prepare(changed)
        assert "same version" in error.value.hint
    for field in setup:
        with pytest.raises(WireError, match=field):
            prepare({name: value for name, value in setup.items() if name != field})
    with pytest.raises(WireError, match="x_max"):
        prepare(setup | {"x_max": 1 << 40})


def test_a_task_for_another_circuit_is_refused(harness: EngineHarness) -> None:
    sealed = harness.seal("w", "forward", torch.randn(3, 16))
    other = compile_circuit(tile(16, 5, 127)).digest
    with pytest.raises(WorkerRefused, match="compiles"):
        harness.answer("w", "forward", sealed, header={**sealed.operand.header, "circuit": other})


def test_a_product_that_cannot_be_compiled_is_named() -> None:
    with pytest.raises(ParameterError, match="cannot compile") as error:
        compile_circuit(CircuitSpec(rows=1, k=8, columns=8, x_max=1 << 40))
    assert error.value.where == "circuit-1x8x8-1099511627776"
    assert "`outsource`" in error.value.hint


def test_circuits_differ_where_their_specs_do_and_nowhere_else() -> None:
    spec = CircuitSpec(rows=2, k=8, columns=4, x_max=127)
    first, second = build_circuit(spec), build_circuit(spec)
    assert first is not second
    assert compile_circuit(spec) is compile_circuit(spec)
    assert first.digest == second.digest
    others = [CircuitSpec(4, 8, 4, 127), CircuitSpec(2, 9, 4, 127), CircuitSpec(2, 8, 4, 126)]
    assert len({first.digest, *(compile_circuit(other).digest for other in others)}) == 4


@pytest.mark.parametrize(("k", "n"), [(1, 1), (32, 96), (576, 960), (960, 576), (1536, 576), (4096, 14336)])
def test_tiles_cover_a_product_and_stay_small(k: int, n: int) -> None:
    spec = tile(k, n, 127)
    tiles = -(-n // spec.columns)
    assert tiles * spec.columns - n < tiles
    assert 1 <= spec.rows <= 16
    assert spec.columns <= 1024
    assert spec.rows == 1 or (spec.rows * spec.columns <= 1024 and spec.rows * k <= 4096)


def test_random_words_are_refused(harness: EngineHarness) -> None:
    sealed = harness.seal("w", "forward", torch.randn(3, 16))
    (part,) = harness.answer("w", "forward", sealed)
    noise = bytearray(os.urandom(part.data.nbytes))
    with pytest.raises(ResultRejected, match="wrong"):
        sealed.opening.check(replace(part, data=memoryview(noise)))


def test_the_process_keeps_its_handlers_of_signals() -> None:
    def caught_and_ignored() -> list[str]:
        lines = Path("/proc/self/status").read_text().splitlines()
        return [line for line in lines if line.startswith(("SigCgt", "SigIgn"))]

    before = caught_and_ignored()
    build_circuit(tile(3, 2, 5))
    assert caught_and_ignored() == before
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
