"""What comes after training: the adapter's directory, merging, GGUF, questions, and the report of a run."""

from __future__ import annotations

import importlib.util
import json
import shutil
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf.quants import dequantize
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import hetrain
from hetrain.export.check import fixed_text, mean_loss
from hetrain.export.gguf_names import TensorLayout
from hetrain.export.loading import load_adapted, open_adapter
from hetrain.public.errors import ModelError, UnsupportedArchitecture, UsageError
from hetrain.public.model.packaged import ALIASES
from tests.harness.processes import HANDBOOK
from tests.harness.processes import hetrain as command

HELD_OUT = HANDBOOK.with_name("handbook_eval.jsonl")
PROMPT = "Question: Who must approve my trip to a customer?\nAnswer:"


@dataclass(frozen=True)
class Run:
    """A run's output directory, its base model, and held-out rows."""

    output: Path
    base: Path
    held_out: Path

    def adapted(self) -> PeftModel:
        """Base model and adapter as stock transformers and peft load them."""
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self.base), str(self.output))


@pytest.fixture(scope="module")
def run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A short encrypted run that changes the tiny model visibly, and its evaluation."""
    directory = tmp_path_factory.mktemp("private")
    held_out = directory / "held_out.jsonl"
    held_out.write_text("".join(HELD_OUT.read_text().splitlines(keepends=True)[:6]))
    training = hetrain.TrainingConfig(
        max_steps=6,
        learning_rate=2e-2,
        micro_batch_tokens=256,
        batch_tokens=512,
        max_staleness=1,
        save_steps=4,
    )
    lora = hetrain.LoraConfig(r=4, alpha=6)
    output = directory / "out"
    hetrain.finetune(HANDBOOK, model=str(tiny_llama), output_dir=output, lora=lora, training=training)
    hetrain.evaluate(held_out, adapter=output, batching=training)
    return Run(output, tiny_llama, held_out)


def records(run: Run) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]


def logits(model: torch.nn.Module, tokenizer_directory: Path) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(tokenizer_directory)(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(tokens).logits.float()


def foreign_adapter(base: Path, directory: Path, **settings: Any) -> Path:
    """An adapter by stock peft, whose tensors have all been moved."""
    torch.manual_seed(5)
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "down_proj"]} | settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(str(directory))
    return directory


class TestAdapterDirectory:
    def test_holds_the_tokenizer_and_no_private_path(self, run: Run) -> None:
        own, base = (AutoTokenizer.from_pretrained(path) for path in (run.output, run.base))
        assert own.chat_template == base.chat_template
        assert own(PROMPT).input_ids == base(PROMPT).input_ids
        config = json.loads((run.output / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "tiny-llama"
        for directory in (run.output, run.output / "checkpoint-4"):
            for name in ("adapter_config.json", "tokenizer_config.json", "README.md"):
                text = (directory / name).read_text() if (directory / name).exists() else ""
                assert str(run.output.parent) not in text
                assert str(run.base.parent) not in text

    def test_the_card_says_how_the_run_was_protected(self, run: Run) -> None:
        card = (run.output / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: peft\nbase_model: tiny-llama\n")
        verified = sum(int(str(record["products"])) for record in records(run))
        assert verified == len(records(run)) * 15  # 8 groups forward, 7 backward: none below the first
        for row in (
            "| engine | rlwe |",
            "| workers saw | ciphertexts only |",
            "205 bits (Core-SVP)",
            f"| products verified | {verified}, each by 16 rows |",
            "| results rejected | 0 |",
            "| workers rejected | none |",
            "| workers | 1 |",
        ):
            assert row in card


class TestMerge:
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [("float32", 1e-4), ("float16", 0.02), ("bfloat16", 0.15)]
    )
    def test_a_stock_model_with_the_adapters_answers(
        self, run: Run, tmp_path: Path, dtype: str, tolerance: float
    ) -> None:
        result = hetrain.merge(run.output, tmp_path / "merged", dtype=dtype)
        assert result.check is not None  # on the rows of the recorded evaluation
        assert result.check.dataset == run.held_out
        assert result.check.holds
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
        assert merged.dtype == getattr(torch, dtype)
        with torch.no_grad():
            plain = logits(AutoModelForCausalLM.from_pretrained(run.base), run.base)
        expected = logits(run.adapted(), run.base)
        torch.testing.assert_close(logits(merged, tmp_path / "merged"), expected, rtol=0, atol=tolerance)
        assert (plain - expected).abs().max() > 3 * tolerance
        assert (tmp_path / "merged/generation_config.json").exists()
        with pytest.raises(UsageError, match="is there already"):
            hetrain.merge(run.output, tmp_path / "merged")

    def test_a_type_that_loses_the_model_is_refused(self, run: Run, tmp_path: Path) -> None:
        large = tmp_path / "large"
        shutil.copytree(run.base, large)
        weights = load_file(large / "model.safetensors")
        weights["model.layers.0.mlp.gate_proj.weight"][0, 0] = 1e6
        save_file(weights, large / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match="not kept"):
            hetrain.merge(run.output, tmp_path / "merged", dtype="float16", model=str(large))
        assert [path.name for path in tmp_path.iterdir()] == ["large"]

    def test_without_rows_it_is_checked_on_a_fixed_text(self, run: Run, tmp_path: Path) -> None:
        result = command("merge", run.output / "checkpoint-4", tmp_path / "m", "--dtype", "float64")
        assert result.returncode == 2
        assert "one of: float32, float16, bfloat16" in " ".join(result.stderr.split())
        alone = tmp_path / "alone"
        alone.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(run.output / name, alone)
        missing = command("merge", alone, tmp_path / "merged")
        assert missing.returncode == 4
        assert "base model tiny-llama is not here" in " ".join(missing.stderr.split())
        done = command("merge", alone, tmp_path / "merged", "-m", run.base)
        assert done.returncode == 0, done.stderr
        assert "loss on a fixed text: trained" in done.stdout


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [5, 7]},
    ],
)
def test_an_adapter_of_one_end_of_tied_embeddings_is_not_merged(
    tiny_llama: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapter = foreign_adapter(tiny_llama, tmp_path / "adapter", **settings)
    with pytest.raises(UsageError, match="output head too"):
        hetrain.merge(adapter, tmp_path / "merged", dtype="float32")
    assert not (tmp_path / "merged").exists()


def test_without_rows_another_adapter_is_checked_on_a_fixed_text(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = foreign_adapter(tiny_llama, tmp_path / "adapter")
    rows = fixed_text(AutoTokenizer.from_pretrained(tiny_llama)).rows
    plain = mean_loss(AutoModelForCausalLM.from_pretrained(tiny_llama), rows, "cpu")
    for result in (
        hetrain.merge(adapter, tmp_path / "merged", dtype="float32"),
        hetrain.export_gguf(adapter, tmp_path / "adapter.gguf"),
    ):
        assert result.check.dataset is None
        assert result.check.exported == pytest.approx(result.check.trained, abs=1e-5)
        assert abs(result.check.trained - plain) > 1e-3


@pytest.mark.parametrize(("layers", "problem"), [(1, "no place for its"), (3, "it lacks")])
def test_an_adapter_of_another_depth_is_refused(
    tiny_llama: Path, tmp_path: Path, layers: int, problem: str
) -> None:
    adapter = foreign_adapter(tiny_llama, tmp_path / "adapter")
    config = AutoConfig.from_pretrained(tiny_llama, num_hidden_layers=layers)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    source = open_adapter(adapter, str(tmp_path / "other"))
    with pytest.raises(UsageError, match=rf"does not fit .*{problem} .* and 3 more"):
        load_adapted(source)


class TestGguf:
    def test_added_to_llama_cpps_weights_it_is_the_merged_model(self, run: Run, tmp_path: Path) -> None:
        """By llama.cpp's own rule, y += alpha / r * B A x, with its names and its order of rows."""
        result = hetrain.export_gguf(run.output, tmp_path / "adapter.gguf", check=HELD_OUT)
        assert result.check is not None
        assert result.check.rows == 48
        assert result.check.trained == pytest.approx(result.check.exported, abs=1e-5)
        reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
        fields = {name: field.contents() for name, field in reader.fields.items()}
        assert fields["general.type"] == "adapter"
        assert fields["general.architecture"] == "llama"
        assert fields["adapter.type"] == "lora"
        assert fields["adapter.lora.alpha"] == 6
        tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
        assert len(tensors) == 2 * 7 * 2
        merged = run.adapted().merge_and_unload().state_dict()
        base = AutoModelForCausalLM.from_pretrained(run.base).state_dict()
        names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
        names |= {"self_attn.o_proj": "attn_output", "mlp.up_proj": "ffn_up"}
        names |= {"mlp.gate_proj": "ffn_gate", "mlp.down_proj": "ffn_down"}
        for module, name in names.items():
            a, b = (tensors[f"blk.1.{name}.weight.lora_{side}"] for side in "ab")
            delta = merged[f"model.layers.1.{module}.weight"] - base[f"model.layers.1.{module}.weight"]
            assert delta.abs().max() > 1e-3
            heads = {"attn_q": 4, "attn_k": 2}.get(name)
            if heads:  # row 2i + h of a head there is row i + h * half here
                half = len(delta) // heads // 2
                order = [
                    head * 2 * half + i + h * half
                    for head in range(heads)
                    for i in range(half)
                    for h in (0, 1)
                ]
                delta = delta[order]
            torch.testing.assert_close(6 / b.shape[1] * b @ a, delta, rtol=1e-4, atol=1e-5)
        with pytest.raises(UsageError, match="is there already"):
            hetrain.export_gguf(run.output, tmp_path / "adapter.gguf")

    def test_its_order_of_rows_is_that_of_a_file_by_llama_cpp(self, smollm2_dir: Path) -> None:
        alias = ALIASES["smollm2-135m"]
        package = importlib.util.find_spec(alias.module)
        assert package is not None
        reader = gguf.GGUFReader(Path(str(package.origin)).parent / alias.file)
        model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
        layout = TensorLayout(model.config)
        theirs = {tensor.name: tensor for tensor in reader.tensors}
        for projection in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"):
            module = f"model.layers.7.{projection}"
            ours = layout.rows_to_gguf(module, model.get_submodule(module).weight.detach())
            tensor = theirs[layout.name(module)]
            stored = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
            torch.testing.assert_close(ours, stored, rtol=1e-3, atol=1e-3)
            assert torch.equal(layout.rows_from_gguf(module, ours), model.get_submodule(module).weight)

    def test_an_unknown_layout_is_refused(self, run: Run, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedArchitecture, match="merge the adapter"):
            TensorLayout(AutoConfig.for_model("gpt_neox"))

    @pytest.mark.parametrize(
        ("settings", "tensor"),
        [
            ({"bias": "all"}, "bias"),
            ({"lora_bias": True}, "lora_B.bias"),
            ({"use_dora": True}, "lora_magnitude_vector"),
            ({"modules_to_save": ["norm"]}, "norm.weight"),
            ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
            ({"trainable_token_indices": [5, 7]}, "token_adapter"),
        ],
    )
    def test_what_the_file_cannot_hold_is_refused(
        self, tiny_llama: Path, tmp_path: Path, settings: dict[str, Any], tensor: str
    ) -> None:
        base = tiny_llama
        if settings.get("bias"):  # the tiny model's linears have none
            base = tmp_path / "biased"
            biased = AutoConfig.from_pretrained(tiny_llama, attention_bias=True)
            AutoModelForCausalLM.from_config(biased).save_pretrained(base)
            AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(base)
        adapter = foreign_adapter(base, tmp_path / "adapter", **settings)
        with pytest.raises(UsageError, match=rf"holds \S*{tensor}.* has no place"):
            hetrain.export_gguf(adapter, tmp_path / "adapter.gguf", model=str(base))
        assert not (tmp_path / "adapter.gguf").exists()


class TestAsk:
    def test_answers_as_the_merged_model_does(self, run: Run, tmp_path: Path) -> None:
        hetrain.merge(run.output, tmp_path / "merged", dtype="float32")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
        inputs = tokenizer(PROMPT, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        expected = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip()
        # The rows' prompts are "Question: ...\nAnswer:". Padding beside a longer question changes nothing.
        question = "Who must approve my trip to a customer?"
        longer = "I need staples from the supply cupboard, and I need them now. What code do I type in?"
        answers = hetrain.ask(run.output, [question, longer, PROMPT], max_new_tokens=8)
        assert answers[0] == answers[2] == expected

    def test_ends_where_the_model_says_that_an_answer_ends(self, tiny_llama: Path, tmp_path: Path) -> None:
        """Models end a turn with tokens that their tokenizers do not name."""
        adapter = foreign_adapter(tiny_llama, tmp_path / "adapter")
        base = tmp_path / "base"
        shutil.copytree(tiny_llama, base)
        tokenizer = AutoTokenizer.from_pretrained(base)
        inputs = tokenizer(PROMPT, return_tensors="pt")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
        new = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs.input_ids.shape[1] :]
        ends = [tokenizer.eos_token_id, int(new[3])]
        GenerationConfig(eos_token_id=ends).save_pretrained(base)
        length = new.tolist().index(ends[1]) + 1
        expected = tokenizer.decode(new[:length], skip_special_tokens=True).strip()
        (answer,) = hetrain.ask(adapter, [PROMPT], model=str(base), prompt_template="{}", max_new_tokens=8)
        assert answer == expected != tokenizer.decode(new, skip_special_tokens=True).strip()

    def test_reads_questions_from_standard_input(self, run: Run, tmp_path: Path) -> None:
        import subprocess

        from tests.harness.processes import HETRAIN

        words = [*HETRAIN, "ask", str(run.output), "-", "--json", "--max-new-tokens", "4"]
        done = subprocess.run(words, input="One?\n\nTwo?\n", capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert [json.loads(line)["question"] for line in done.stdout.splitlines()] == ["One?", "Two?"]
        said = command("ask", run.output, "One?", "--max-new-tokens", 4)
        assert said.returncode == 0
        assert "in clear, on this machine" in " ".join(said.stderr.split())
        nothing = command("ask", tmp_path, "One?")
        assert nothing.returncode == 2
        assert "no adapter_config.json" in nothing.stderr


class _Page(HTMLParser):
    """Headings and attributes that would load something."""

    def __init__(self) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.loads: list[str] = []
        self._in_heading = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_heading = tag == "h2"
        self.loads += [name for name, _ in attrs if name in ("src", "href", "srcset")] + ["script"] * (
            tag == "script"
        )

    def handle_data(self, data: str) -> None:
        if self._in_heading:
            self.headings.append(data)
            self._in_heading = False


def test_the_report_is_one_page_that_loads_nothing(run: Run, tmp_path: Path) -> None:
    path = hetrain.report(run.output, tmp_path / "report.html")
    text = path.read_text()
    page = _Page()
    page.feed(text)
    assert page.loads == []
    assert page.headings == [
        "Loss",
        "Staleness",
        "Where time went",
        "Where bytes went",
        "Workers",
        "Noise headroom",
        "Verification and protection",
        "Configuration",
    ]
    charts = [ET.fromstring(f"<svg{part.partition('</svg>')[0]}</svg>") for part in text.split("<svg")[1:]]
    assert len(charts) == 6
    assert all(chart.get("aria-label") for chart in charts)
    dots = charts[0].findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(dots) == len(records(run)) + 1  # and the evaluation
    assert "held_out.jsonl: loss" in text
    with pytest.raises(UsageError, match=r"no job\.json"):
        hetrain.report(tmp_path)
