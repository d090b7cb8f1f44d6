"""Models that several test files share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hetrain.public.model.files import resolve

pytest.register_assert_rewrite("tests.harness.split_model")


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The Hugging Face directory of SmolLM2-135M."""
    return resolve("smollm2-135m").directory


@pytest.fixture(scope="session")
def tiny_llama(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with SmolLM2's tokenizer: real in all but size."""
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(AutoTokenizer.from_pretrained(smollm2_dir)),
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2_dir / name, directory)
    return directory


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny matrices are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
