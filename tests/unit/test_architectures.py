"""Splitting every supported architecture: faithful to transformers and peft, or refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity
from transformers import AutoConfig, AutoModelForCausalLM

from hetrain.config import LoraConfig
from hetrain.data.packing import MicroBatch, micro_batches
from hetrain.data.shared_prompt import shared_prompts
from hetrain.nn.lora import adapter_parameters, add_adapter, load_adapter
from hetrain.nn.prefix import PrefixStore
from hetrain.nn.replica import Replica
from hetrain.nn.split import split_model
from hetrain.public.errors import ModelError, UnsupportedArchitecture, UsageError
from hetrain.public.model.files import resolve
from hetrain.train.step import StepResult, run_evaluation, run_step
from tests.harness.split_model import (
    FAMILIES,
    GPT2_SIZES,
    GROUPED,
    SIZES,
    VOCABULARY,
    Family,
    SplitHarness,
    assert_faithful,
    assert_nothing_held,
    packed,
    prompted_rows,
    rows,
    save_model,
    stock_loss,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# The members of each group of the second block, without the block's own prefix.
QKV = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
GROUPS = {
    "llama": [QKV, "self_attn.o_proj", "mlp.gate_proj mlp.up_proj", "mlp.down_proj"],
    "gemma2": [QKV, "self_attn.o_proj", "mlp.gate_proj mlp.up_proj", "mlp.down_proj"],
    "phi": [f"{QKV} mlp.fc1", "self_attn.dense", "mlp.fc2"],
    "phi3": ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    "cohere": [f"{QKV} mlp.gate_proj mlp.up_proj", "self_attn.o_proj", "mlp.down_proj"],
    "gpt-neox": ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
}

REFUSED = {
    "falcon": (Family("falcon", SIZES), "FalconForCausalLM", "attention interface"),
    "gptj": (Family("gptj", {**GPT2_SIZES, "rotary_dim": 4}), "GPTJForCausalLM", "attention interface"),
    "codegen": (Family("codegen", {**GPT2_SIZES, "rotary_dim": 4}), "CodeGenModel", "attention interface"),
    "bloom": (
        Family("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}),
        "BloomModel",
        "attention interface",
    ),
    "mpt": (
        Family("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": VOCABULARY}),
        "MptModel",
        "trial run",
    ),
    "mixtral": (
        Family("mixtral", {**GROUPED, "num_local_experts": 4}),
        "model.layers.0.mlp",
        "MixtralTopKRouter",
    ),
    "qwen3-moe": (
        Family("qwen3_moe", {**GROUPED, "num_experts": 4, "moe_intermediate_size": 16}),
        "model.layers.0.mlp.experts",
        "Qwen3MoeExperts",
    ),
    "mamba": (
        Family("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY}),
        "backbone.layers.0.mixer",
        "MambaMixer",
    ),
    "bert": (Family("bert", SIZES), "BertSelfAttention", "not causal"),
    "modernbert-decoder": (
        Family("modernbert-decoder", {**SIZES, "cls_token_id": 1, "sep_token_id": 2}),
        "ModernBertDecoderForCausalLM",
        "other logits",
    ),
    "llama4": (
        Family("llama4_text", {**GROUPED, "moe_layers": [], "head_dim": 8, "intermediate_size_mlp": 48}),
        "Llama4",
        "chunked_attention",
    ),
}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    save_model(FAMILIES["llama"], directory)
    return directory


@pytest.mark.parametrize("name", FAMILIES)
def test_split_model_is_faithful(name: str, tmp_path: Path) -> None:
    save_model(FAMILIES[name], tmp_path)
    harness = SplitHarness(tmp_path)
    assert_faithful(harness)
    assert_nothing_held(harness)
    groups = [group.name for group in harness.split.plan.groups]
    forward, backward = (
        [group for way, group in harness.requests if way == d] for d in ("forward", "backward")
    )
    assert forward == groups
    # No gradient is computed for an input that nothing trainable lies below: that of the first group, and
    # that of the first MLP where it stands beside attention with a norm of its own.
    below = {groups[0], "gpt_neox.layers.0.mlp.dense_h_to_4h"} if name == "gpt-neox" else {groups[0]}
    assert sorted(backward) == sorted(set(groups) - below)


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "gpt-neox", "opt", "deepseek-v3-dense"]
)
def test_a_prompt_that_rows_share_is_computed_once(name: str, tmp_path: Path) -> None:
    """Also where it is longer than a sliding window, and where its tokens are learned."""
    save_model(FAMILIES[name], tmp_path)
    some = prompted_rows()
    batch = packed(some)
    assert batch.n_tokens == sum(len(row.tokens) for row in some) - 3 * 6
    assert_faithful(SplitHarness(tmp_path), some)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "phi", "opt"])
def test_after_the_last_attention_only_tokens_that_predict_are_sent(name: str, tmp_path: Path) -> None:
    save_model(FAMILIES[name], tmp_path)
    harness = SplitHarness(tmp_path)
    learned = [(False,) * (len(row.tokens) - 2) + (True,) * 2 for row in prompted_rows()]
    some = [replace(row, supervised=each) for row, each in zip(prompted_rows(), learned, strict=True)]
    assert_faithful(harness, some)
    batch = packed(some)
    predicting = torch.cat(batch.places)[batch.targets >= 0].unique()
    tokens = {}  # of each product, whose operand has three bytes a value
    for group in harness.split.block_groups:
        for way, width in (("forward", group.in_features), ("backward", group.out_features)):
            if size := harness.sizes.get((way, group.name)):
                tokens[way, group.name] = size // (3 * width)
    last_block = [group.name for group in harness.split.block_groups if ".1." in group.members[0].module]
    past = {product for product in tokens if product[1] in last_block[1:]}
    assert len(past) == 2 * len(last_block[1:])
    assert {tokens[product] for product in past} == {len(predicting)}
    assert {tokens[product] for product in tokens.keys() - past} == {batch.n_tokens}


@pytest.mark.parametrize("name", GROUPS)
def test_linears_that_share_an_input_form_a_group(name: str, tmp_path: Path) -> None:
    save_model(FAMILIES[name], tmp_path)
    groups = split_model(resolve(str(tmp_path))).block_groups
    second_block = groups[len(groups) // 2 :]
    found = [" ".join(member.module.split(".1.")[1] for member in group.members) for group in second_block]
    assert found == GROUPS[name]


@pytest.mark.parametrize("form", ["sharded", "bf16", "bare"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_forms_of_a_checkpoint(form: str, name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    if form == "bare":
        family = Family(family.model_type, {**family.config, "tie_word_embeddings": True})
    model = save_model(family, tmp_path, **({"max_shard_size": "20KB"} if form == "sharded" else {}))
    if form == "bf16":
        model.to(torch.bfloat16).save_pretrained(tmp_path)
    if form == "bare":
        model.base_model.save_pretrained(tmp_path)
    tensors = resolve(str(tmp_path)).tensors
    assert (len(set(tensors.values())) > 1) == (form == "sharded")
    assert any("lm_head" in t or t.startswith(("model.", "transformer.")) for t in tensors) == (
        form != "bare"
    )
    harness = SplitHarness(tmp_path)
    # Embeddings are most of what the client holds.
    stored = torch.bfloat16 if form == "bf16" else torch.float32
    assert harness.split.causal.get_input_embeddings().weight.dtype == stored
    assert_faithful(harness)
    here = SplitHarness(tmp_path, outsource=("*.*.*",))
    assert here.split.causal.get_output_embeddings().weight.dtype == stored
    assert_faithful(here)


def test_tied_embeddings_may_be_saved_under_the_name_of_the_head(tmp_path: Path) -> None:
    save_model(Family("llama", {**GROUPED, "tie_word_embeddings": True}), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_faithful(SplitHarness(tmp_path))


def test_only_what_lies_above_an_adapter_is_differentiated(llama: Path) -> None:
    harness = SplitHarness(llama, LoraConfig(r=2, target_modules=("layers.1.self_attn.q_proj",)))
    run_step(harness.replica(), packed(rows()), harness.snapshot(), seed=0)
    block = "model.layers.1"
    assert [group for way, group in harness.requests if way == "backward"] == [
        "lm_head",
        f"{block}.mlp.down_proj",
        f"{block}.mlp.gate_proj",
        f"{block}.self_attn.o_proj",
    ]


def test_nothing_is_computed_backward_below_the_lowest_layer_with_adapters(llama: Path) -> None:
    harness = SplitHarness(llama, LoraConfig(r=2, layers="1"))
    assert {name.split("layers.")[1][0] for name in adapter_parameters(harness.model)} == {"1"}
    run_step(harness.replica(), packed(rows()), harness.snapshot(), seed=0)
    backward = [group for way, group in harness.requests if way == "backward"]
    assert backward
    assert all("layers.1." in group or group == "lm_head" for group in backward)
    with pytest.raises(UsageError, match="no layer 9") as caught:
        SplitHarness(llama, LoraConfig(r=2, layers="0,2-9"))
    assert caught.value.field == "layers"


@pytest.mark.parametrize("limit", [1 << 20, 0], ids=["in memory", "on disk"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "gemma2", "opt"])
def test_what_lies_below_the_adapters_is_computed_once_for_each_row(
    name: str, limit: int, tmp_path: Path
) -> None:
    save_model(FAMILIES[name], tmp_path)
    harness = SplitHarness(tmp_path, LoraConfig(r=2, layers="1"))
    store = PrefixStore(limit)
    one, other = (
        Replica(harness.split, harness.model, harness.channel, harness.sealer, store) for _ in range(2)
    )
    some = prompted_rows()
    layout = [(0, 1, 2), (2, 3), (3, 1, 0)]  # each time another row comes first and has the prompt's states
    known, mixed, shuffled = micro_batches(some, layout, shared_prompts(some))

    def groups(replica: Replica, batch: MicroBatch) -> tuple[StepResult, set[str]]:
        del harness.requests[:]
        result = run_step(replica, batch, harness.snapshot(), seed=0)
        found = (re.findall(r"[.](\d+)[.]", group) for _, group in harness.requests)
        return result, {number for each in found for number in each}

    assert groups(one, known)[1] == {"0", "1"}
    assert groups(other, mixed)[1] == {"0", "1"}, "one of its rows has not been seen"
    kept, sent = groups(other, shuffled)
    assert sent == {"1"}
    expected = run_step(harness.replica(), shuffled, harness.snapshot(), seed=0)
    assert kept.summed_loss == pytest.approx(expected.summed_loss, rel=1e-3)
    assert kept.gradients is not None
    assert expected.gradients is not None
    for parameter, gradient in kept.gradients.items():
        assert cosine_similarity(gradient.flatten(), expected.gradients[parameter].flatten(), dim=0) > 0.999
    assert groups(other, known)[1] == {"1"}


def test_states_that_float16_cannot_hold_are_kept_as_they_are() -> None:
    states = torch.tensor([[1e6, 1.0], [2.0, 3.0]])
    for limit in (1 << 20, 0):
        store = PrefixStore(limit)
        store.keep(7, states)
        assert torch.equal(store.get(7, 2), states)
        assert store.has([7])
        assert not store.has([7, 8])


def test_rows_longer_than_a_ciphertext_travel_in_blocks(tmp_path: Path) -> None:
    save_model(
        Family("llama", {**GROUPED, "num_hidden_layers": 1, "max_position_embeddings": 2048}), tmp_path
    )
    harness = SplitHarness(tmp_path)
    batch = packed(rows((1200, 900)))
    loss = run_evaluation(harness.replica(), batch)
    with torch.no_grad():
        expected = sum(stock_loss(harness.stock_peft(), row).item() for row in rows((1200, 900)))
    assert loss == pytest.approx(expected, rel=1e-4)
    assert len(harness.requests) == 2 * len(harness.split.plan.groups)


def test_dropout_is_a_function_of_seed_and_micro_batch(llama: Path) -> None:
    harness = SplitHarness(llama, LoraConfig(r=4, alpha=8, dropout=0.3))
    first, second = micro_batches(rows() + rows(), [(0, 1, 2), (3, 4, 5)])
    assert torch.equal(first.tokens, second.tokens)
    one, other = harness.replica(), harness.replica()

    def loss(replica: Replica, batch: MicroBatch, seed: int) -> float:
        return run_step(replica, batch, harness.snapshot(), seed).summed_loss

    expected = loss(one, first, 7)
    others = {loss(one, second, 7), loss(one, first, 8), run_evaluation(one, first)}
    assert len(others | {expected}) == 4
    torch.manual_seed(12345)
    assert loss(other, first, 7) == expected
    assert run_evaluation(other, second) == run_evaluation(one, first)


def test_adapter_is_seeded_and_starts_at_zero(llama: Path) -> None:
    torch.manual_seed(99)
    state = torch.get_rng_state()
    first, again, other = (
        adapter_parameters(add_adapter(split_model(resolve(str(llama))), LoraConfig(r=4), seed))
        for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) == ("lora_B" in name) for name in first)
    assert not any(parameter.any() for name, parameter in first.items() if "lora_B" in name)


@pytest.mark.filterwarnings("error:fan_in_fan_out")
@pytest.mark.parametrize(
    ("name", "outsource", "layers"),
    [
        ("llama", "*", None),
        ("gpt2", "*", None),
        ("gpt-neox", "*", None),
        ("opt", "*", None),
        ("llama", "*.q_proj", None),
        ("gpt2", "*.c_attn", None),
        ("gpt2", "*.mlp.c_proj", None),
        ("opt", "*.fc1", None),
        ("llama", "*", "1"),
        ("gpt2", "*", "0"),
        ("opt", "*", "1"),
    ],
)
def test_saved_adapter_loads_in_stock_peft_and_here(
    name: str, outsource: str, layers: str | None, tmp_path: Path
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_model(FAMILIES[name], base)
    harness = SplitHarness(base, LoraConfig(r=4, alpha=8, layers=layers), (outsource,))
    expected = run_evaluation(harness.replica(), packed(rows()))
    harness.model.save_pretrained(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is (name == "gpt2")
    stock = PeftModel.from_pretrained(harness.stock(), adapter)
    with torch.no_grad():
        loss = sum(stock_loss(stock, row).item() for row in rows())
        untrained = sum(stock_loss(harness.stock(), row).item() for row in rows())
        merged = stock.merge_and_unload()
        assert sum(stock_loss(merged, row).item() for row in rows()) == pytest.approx(loss, rel=1e-4)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert abs(untrained - loss) > 2e-3 * loss
    fresh = split_model(resolve(str(base)), (outsource,))
    replica = Replica(fresh, load_adapter(fresh, adapter), harness.channel, harness.sealer)
    assert run_evaluation(replica, packed(rows())) == expected


def test_adapter_on_what_stays_with_the_client_is_refused(llama: Path) -> None:
    with pytest.raises(UsageError, match="lm_head is no linear of a decoder block"):
        add_adapter(
            split_model(resolve(str(llama))), LoraConfig(target_modules=("q_proj", "lm_head")), seed=0
        )


def test_adapter_that_needs_the_matrices_is_refused(llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], use_dora=True)).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="only plain LoRA"):
        load_adapter(split_model(resolve(str(llama))), tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_architecture_is_refused_by_name(name: str, tmp_path: Path) -> None:
    family, module, reason = REFUSED[name]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family.model_type, **family.config)
    ).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitecture) as caught:
        split_model(resolve(str(tmp_path)))
    assert caught.value.where.startswith(module)
    assert reason in caught.value.what
    assert "\n" not in str(caught.value)


def _without_tensor(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _without_norm(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _norm_not_finite(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _other_shape(directory: Path) -> None:
    _edit_config(directory, intermediate_size=64)


def _edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _index(weight_map: object) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "tensor missing": (_without_tensor, "no tensor model.layers.1.mlp.down_proj.weight"),
    "norm missing": (_without_norm, "no tensor model.norm.weight"),
    "norm not finite": (_norm_not_finite, "not finite"),
    "other shape": (_other_shape, "output channels"),
    "no safetensors": (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "config no json": (lambda d: (d / "config.json").write_text("{"), "config.json"),
    "unknown type": (lambda d: _edit_config(d, model_type="unheard_of"), "unheard_of"),
    "own code": (
        lambda d: _edit_config(d, model_type="mine", auto_map={"AutoConfig": "mine.MyConfig"}),
        "config.json",
    ),
    "invalid config": (lambda d: _edit_config(d, num_attention_heads=5), "config.json"),
    "quantised": (
        lambda d: _edit_config(d, quantization_config={"quant_method": "fp8"}),
        "quantised already",
    ),
    "truncated": (_truncate, "model.safetensors cannot be read"),
    "not safetensors": (lambda d: (d / "model.safetensors").write_bytes(b"x" * 100), "cannot be read"),
    "index of another form": (_index(["a"]), "index.json cannot be read"),
    "index of no files": (_index({"model.embed_tokens.weight": 3}), "index.json cannot be read"),
    "shard missing": (
        lambda d: _index(dict.fromkeys(resolve(str(d)).tensors, "model-00001-of-00002.safetensors"))(d),
        "model-00001-of-00002.safetensors",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    save_model(FAMILIES["llama"], tmp_path)
    spoil, message = DAMAGE[damage]
    spoil(tmp_path)
    with pytest.raises(ModelError) as caught:
        split_model(resolve(str(tmp_path)))
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value) or "." in caught.value.where
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)
