"""A model that trains in a fraction of a second, its tokenizer included."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_TOKENS = 512


def save_tiny_model(directory: Path, text: str) -> None:
    """Saves a random Llama of two layers, with a byte-level tokenizer that is trained on `text`."""
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_TOKENS,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokens.train_from_iterator(text.splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<eos>", pad_token="<eos>")
    save_tiny_llama(directory, len(tokenizer), bos_token_id=0, eos_token_id=0)
    tokenizer.save_pretrained(directory)


def save_tiny_llama(directory: Path, vocab_size: int, **settings: int) -> None:
    """Saves a random Llama of two layers, the same at every call, without a tokenizer."""
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        tie_word_embeddings=True,
        **settings,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
