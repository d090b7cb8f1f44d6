"""Rows equal those of TRL's `SFTTrainer` under each of TRL's chat templates, and for many random rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hetrain.public.errors import DatasetError, ModelError
from tests.harness.trl_rows import FORMS, TEMPLATES, assert_rows_equal, our_rows, random_lines, trl_rows

# Of models that see pictures: they write no content that is a string, and TRL trains on what is left.
DROP_STRINGS = ("idefics3", "smolvlm")


@pytest.fixture
def tokenizer(smollm2_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.mark.parametrize("max_length", [16, 60, 1024])
@pytest.mark.parametrize("form", FORMS)
def test_many_rows(form: str, max_length: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    if form == "message pairs" and max_length == 16:
        pytest.skip("the chat template alone is longer")
    assert assert_rows_equal(random_lines(form, 2000, seed=max_length), tokenizer, max_length, tmp_path) > 200


@pytest.mark.parametrize("template", sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
@pytest.mark.parametrize("form", FORMS[2:])
def test_every_chat_template(
    form: str, template: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Templates that refuse system messages, or strings as content, do so on both sides."""
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    lines = random_lines(form, 20, seed=7)
    without_system = [line for line in lines if '"system"' not in json.dumps(line)]
    cases: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [(lines, {}), (without_system, {})]
    if form == "messages":
        cases.append((without_system, {"assistant_only_loss": True}))
    for some, options in cases:
        try:
            trl_rows(some, tokenizer, 1024, tmp_path, **options)
        except (TemplateError, TypeError):
            with pytest.raises(DatasetError, match="chat template refuses"):
                our_rows(some, tokenizer, 1024, tmp_path, **options)
        except (ValueError, RuntimeError):
            with pytest.raises((ModelError, DatasetError)):
                our_rows(some, tokenizer, 1024, tmp_path, **options)
        else:
            if template.startswith(DROP_STRINGS):
                with pytest.raises(DatasetError, match="chat template drops"):
                    our_rows(some, tokenizer, 1024, tmp_path, **options)
            else:
                assert_rows_equal(some, tokenizer, 1024, tmp_path, **options)
