"""Prompts that are worded as in training, names of base models, and what is made of records."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hetrain.config import DataConfig
from hetrain.data.prompts import PromptTemplate, prompt_template
from hetrain.data.tokenization import read_rows
from hetrain.export.asking import Generation
from hetrain.export.check import LossCheck, fixed_text, held_out_rows
from hetrain.export.report.charts import ticks
from hetrain.nn.adapter_files import base_model_of
from hetrain.public.errors import DatasetError, ModelError, UsageError
from hetrain.public.model.files import public_name
from hetrain.train.records import add_evaluation


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2_dir)


def template_of(
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    *rows: dict[str, object],
    completion_only_loss: bool | None = None,
) -> PromptTemplate:
    config = DataConfig(completion_only_loss=completion_only_loss)
    path = directory / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return prompt_template(read_rows(path, tokenizer, 512, config), tokenizer)


class TestPrompts:
    @pytest.mark.parametrize("completion_only_loss", [None, False])
    def test_strings_share_their_beginning_and_end(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, completion_only_loss: bool | None
    ) -> None:
        rows = [
            {"prompt": f"Question: What is {x}?\nAnswer:", "completion": " It."} for x in ("a pig", "one")
        ]
        template = template_of(tmp_path, tokenizer, *rows, completion_only_loss=completion_only_loss)
        assert template == PromptTemplate(False, "Question: ", "\nAnswer:")
        assert template.apply("Why?", tokenizer) == "Question: Why?\nAnswer:"
        assert template.apply("Question: Why?\nAnswer:", tokenizer) == "Question: Why?\nAnswer:"

    @pytest.mark.parametrize("prompts", [["What is it?", "What was it?"], ["Why? Say: yes\nA:"] * 2])
    def test_nothing_is_made_of_a_coincidence(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
    ) -> None:
        rows = [{"prompt": prompt, "completion": " It."} for prompt in prompts]
        assert template_of(tmp_path, tokenizer, *rows) == PromptTemplate(False)

    @pytest.mark.parametrize("form", ["messages", "pair"])
    def test_lists_of_messages_take_the_chat_template(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, form: str
    ) -> None:
        ask, say = ({"role": role, "content": "Why?"} for role in ("user", "assistant"))
        row = {"messages": [ask, say]} if form == "messages" else {"prompt": [ask], "completion": [say]}
        template = template_of(tmp_path, tokenizer, row)
        assert template.is_chat
        expected = tokenizer.apply_chat_template([ask], tokenize=False, add_generation_prompt=True)
        assert template.apply("Why?", tokenizer) == expected


class TestHeldOutRows:
    """Of a run that learned `question` and `answer`."""

    @pytest.fixture
    def adapter(self, tmp_path: Path) -> Path:
        directory = tmp_path / "out"
        directory.mkdir()
        columns = {"prompt_field": "question", "completion_field": "answer"}
        (directory / "job.json").write_text(json.dumps({"data": columns, "steps": 3}))
        return directory

    @staticmethod
    def write(path: Path, prompt: str, completion: str, count: int) -> Path:
        path.write_text(f"{json.dumps({prompt: 'Why?', completion: ' So.'})}\n" * count)
        return path

    def test_of_an_evaluation_are_read_as_it_read_them(
        self, tmp_path: Path, adapter: Path, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        first = self.write(tmp_path / "first.jsonl", "question", "answer", 1)
        add_evaluation(adapter, [str(first)], {"loss": 1.0})  # with the job's own columns
        assert held_out_rows(None, adapter, tokenizer).dataset == first
        second = self.write(tmp_path / "second.jsonl", "q", "a", 2)
        columns = asdict(DataConfig(prompt_field="q", completion_field="a"))
        add_evaluation(adapter, [str(second)], {"loss": 1.0, "data": columns})
        found = held_out_rows(None, adapter, tokenizer)
        assert (found.dataset, len(found.rows)) == (second, 2)

    def test_of_an_evaluation_that_cannot_be_read_give_way_to_a_text(
        self,
        tmp_path: Path,
        adapter: Path,
        tokenizer: PreTrainedTokenizerBase,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        rows = self.write(tmp_path / "rows.jsonl", "other", "columns", 1)
        add_evaluation(adapter, [str(rows)], {"loss": 1.0})
        assert held_out_rows(None, adapter, tokenizer) == fixed_text(tokenizer)
        assert f"not checked on the rows of the last evaluation: {rows}" in caplog.text
        with pytest.raises(
            DatasetError, match="none of the known columns"
        ):  # given by name, they are an error
            held_out_rows(rows, adapter, tokenizer)

    def test_that_are_given_have_the_columns_of_the_job_or_the_usual_ones(
        self, tmp_path: Path, adapter: Path, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        for count, names in enumerate((("question", "answer"), ("prompt", "completion")), 1):
            rows = self.write(tmp_path / "rows.jsonl", *names, count)
            assert len(held_out_rows(rows, adapter, tokenizer).rows) == count


class TestBaseModel:
    def test_public_names_have_no_path(self, tmp_path: Path) -> None:
        snapshot = tmp_path / "hub/models--some-lab--a-model-7b/snapshots/0f3c"
        own = tmp_path / "secret project" / "my model"
        for directory in (snapshot, own):
            directory.mkdir(parents=True)
        assert public_name(str(snapshot)) == "some-lab/a-model-7b"
        assert public_name(str(own)) == "my-model"
        assert public_name("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert public_name("some-lab/other") == "some-lab/other"

    def test_is_where_the_run_found_it_or_goes_by_its_name(self, tmp_path: Path) -> None:
        checkpoint, model = tmp_path / "out/checkpoint-3", tmp_path / "model"
        checkpoint.mkdir(parents=True)
        model.mkdir()
        config = {"peft_type": "LORA", "base_model_name_or_path": "public/name"}
        for directory in (checkpoint, checkpoint.parent):
            (directory / "adapter_config.json").write_text(json.dumps(config))

        def job(**values: object) -> None:
            (checkpoint.parent / "job.json").write_text(json.dumps(values))

        assert base_model_of(checkpoint) == "public/name"
        job(model="./model", model_path=str(model))
        assert base_model_of(checkpoint) == base_model_of(checkpoint.parent) == str(model)
        job(model="smollm2-135m", model_path=None)
        assert base_model_of(checkpoint) == "smollm2-135m"
        job(model="./model", model_path="/elsewhere")  # the directory of another machine
        assert base_model_of(checkpoint) == "public/name"
        (checkpoint / "adapter_config.json").write_text("{}")
        with pytest.raises(UsageError, match="names no base model"):
            base_model_of(checkpoint)


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (2.6, 3.7, [3, 3.5]), (7, 7, [7])]
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -0.1])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(UsageError) as caught:
        Generation(temperature=temperature)
    assert caught.value.field == "temperature"


@pytest.mark.parametrize("exported", [2.06, 1.94, float("nan")])
def test_an_export_with_another_loss_is_refused(exported: float) -> None:
    LossCheck(Path("rows"), 3, 2.0, 2.04, 0.05).require()
    with pytest.raises(ModelError, match="not kept"):
        LossCheck(Path("rows"), 3, 2.0, exported, 0.05).require()
