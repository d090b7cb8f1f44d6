"""SmolLM2-135M after a short training: exports are the adapter, and answers are those of its merged model."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import hetrain
from tests.harness.processes import HANDBOOK

HELD_OUT = HANDBOOK.with_name("handbook_eval.jsonl")
QUESTION = "Where does Brindlewick receive visitors?"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five encrypted updates: enough to change answers."""
    directory = tmp_path_factory.mktemp("trained")
    training = hetrain.TrainingConfig(max_steps=5, batch_tokens=512, learning_rate=2e-3)
    hetrain.finetune(HANDBOOK, output_dir=directory / "out", training=training)
    return directory / "out"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_merged_model_has_the_adapters_loss(adapter: Path, tmp_path: Path, dtype: str) -> None:
    result = hetrain.merge(adapter, tmp_path / "merged", dtype=dtype, check=HELD_OUT)
    assert result.check is not None
    assert result.check.trained < 3  # 3.9 before training
    assert result.check.holds
    if dtype == "float32":
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
        inputs = tokenizer(f"Question: {QUESTION}\nAnswer:", return_tensors="pt")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        expected = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip()
        assert hetrain.ask(adapter, QUESTION, max_new_tokens=16) == [expected]
        assert hetrain.ask(adapter, QUESTION, max_new_tokens=16, base_only=True) != [expected]


def test_its_gguf_has_the_adapters_loss(adapter: Path, tmp_path: Path) -> None:
    result = hetrain.export_gguf(adapter, tmp_path / "adapter.gguf", check=HELD_OUT)
    assert result.check is not None
    assert result.check.exported == pytest.approx(result.check.trained, abs=1e-4)
