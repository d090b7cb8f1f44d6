"""The rows and commands of docs/data.md are read as it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from typer.testing import CliRunner

from cli.main import add_commands, app
from hetrain.config import TrainingDataConfig
from hetrain.data.dataset import divide, read_raw_rows
from hetrain.data.sources import HubSplit
from hetrain.data.tokenization import tokenize_rows

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r'^```\w+ title="([\w.]+)"\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"^hetrain submit (.*)$", PAGE, re.MULTILINE)
ANSWER = "Mira, on Mondays."


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HETRAIN_BROKER_URL", raising=False)


def learned(tokenizer: PreTrainedTokenizerBase, *names: str, **options: Any) -> list[str]:
    """What the rows teach."""
    config = TrainingDataConfig(**options)
    rows = tokenize_rows(read_raw_rows(names, config, HubSplit()), tokenizer, 512, config)
    return [
        tokenizer.decode([token for token, counts in zip(row.tokens, row.supervised, strict=True) if counts])
        for row in rows
    ]


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("questions.csv", "job.yaml")])
def test_each_form_is_read(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = learned(tokenizer, name, strict=True)
    everything = name in ("messages.jsonl", "sharegpt.json", "texts.jsonl")
    assert texts[0].removesuffix("\n").removesuffix("<|im_end|>").endswith("on Mondays.")
    assert (texts[0].strip() != f"{ANSWER}<|im_end|>") == everything
    if name == "alpaca.csv":
        assert texts[1] == "die Pflanzen<|im_end|>\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_reads_its_rows(command: str, tokenizer: PreTrainedTokenizerBase) -> None:
    add_commands()
    result = CliRunner().invoke(app, ["submit", *command.split(), "--print-config"])
    assert result.exit_code == 0, result.output
    found = yaml.safe_load(result.output)
    known = TrainingDataConfig.__dataclass_fields__
    options = {name: value for name, value in found.items() if name in known}
    texts = learned(tokenizer, *found["dataset"], **options)
    if "assistant_only_loss" in command or "_field" in command or "job.yaml" in command:
        assert texts[0].strip() == f"{ANSWER}<|im_end|>"
    if "validation" in command:
        config = TrainingDataConfig(**options)
        divided = divide(read_raw_rows(found["dataset"], config, HubSplit()), config.validation_split, 42)
        assert [len(divided.learned), len(divided.held_out)] == [2, 1]
    if "job.yaml" in command:
        shown = {name: found[name] for name in ("learning_rate", "lora_r", "lora_target_modules")}
        assert shown == {"learning_rate": 1e-3, "lora_r": 8, "lora_target_modules": ["q_proj", "v_proj"]}


def test_the_page_has_a_row_of_every_form() -> None:
    assert len(FILES) == 8
    assert len(COMMANDS) == 5
