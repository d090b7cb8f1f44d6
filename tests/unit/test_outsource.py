"""Any part of a model may be outsourced: the rest runs on the client, and the result is the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from hetrain.config import LoraConfig
from hetrain.nn.lora import adapter_parameters, add_adapter
from hetrain.nn.remote import RemoteLinear
from hetrain.nn.split import HEAD_ROWS, split_model
from hetrain.public.errors import UsageError
from hetrain.public.model.files import resolve
from hetrain.train.step import run_step
from tests.harness.split_model import (
    FAMILIES,
    SIZES,
    Family,
    SplitHarness,
    assert_faithful,
    assert_nothing_held,
    packed,
    rows,
    save_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA = "model.layers"
NEOX_MLP = "gpt_neox.layers.0.mlp"


@dataclass(frozen=True)
class Subset:
    """Patterns, the groups they make (members joined by spaces), and those with nothing trainable below."""

    family: str
    patterns: tuple[str, ...]
    groups: tuple[str, ...]
    bottom: tuple[str, ...] = ()


SUBSETS = {
    "one member of a group": Subset(
        "llama-biased",
        ("*.k_proj",),
        (f"{LLAMA}.0.self_attn.k_proj", f"{LLAMA}.1.self_attn.k_proj"),
        (f"{LLAMA}.0.self_attn.k_proj",),
    ),
    "two members of three, and another kind": Subset(
        "llama",
        ("*.1.*.[qv]_proj", "*.down_proj"),
        (
            f"{LLAMA}.0.mlp.down_proj",
            f"{LLAMA}.1.self_attn.q_proj {LLAMA}.1.self_attn.v_proj",
            f"{LLAMA}.1.mlp.down_proj",
        ),
    ),
    "overlapping patterns on one block": Subset(
        "llama",
        ("model.layers.1.mlp.*", "*.layers.1.*_proj"),
        (
            " ".join(f"{LLAMA}.1.self_attn.{x}_proj" for x in "qkv"),
            f"{LLAMA}.1.self_attn.o_proj",
            f"{LLAMA}.1.mlp.gate_proj {LLAMA}.1.mlp.up_proj",
            f"{LLAMA}.1.mlp.down_proj",
        ),
    ),
    "an input that attention and mlp share": Subset(
        "phi",
        ("*.0.*.v_proj", "*.0.mlp.fc1"),
        (f"{LLAMA}.0.self_attn.v_proj {LLAMA}.0.mlp.fc1",),
        (f"{LLAMA}.0.self_attn.v_proj",),
    ),
    "the mlp beside attention": Subset(
        "gpt-neox",
        ("*.0.mlp.*",),
        (f"{NEOX_MLP}.dense_h_to_4h", f"{NEOX_MLP}.dense_4h_to_h"),
        (f"{NEOX_MLP}.dense_h_to_4h",),
    ),
    "the output head alone": Subset("llama", ("lm_head",), ("lm_head",)),
    "Conv1D below Conv1D": Subset(
        "gpt2",
        ("*.attn.c_proj", "*.1.mlp.c_fc"),
        ("transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_fc"),
    ),
}


@pytest.mark.parametrize("name", SUBSETS)
def test_any_subset_gives_the_same_loss_and_gradients(name: str, tmp_path: Path) -> None:
    subset = SUBSETS[name]
    save_model(FAMILIES[subset.family], tmp_path)
    harness = SplitHarness(tmp_path, outsource=subset.patterns)
    groups = [" ".join(member.module for member in group.members) for group in harness.split.plan.groups]
    assert groups == list(subset.groups)
    assert_faithful(harness)  # the adapter has the parameters of stock peft: those of all linears
    assert_nothing_held(harness)
    heads = [members.split()[0] for members in subset.groups]
    assert [group for way, group in harness.requests if way == "forward"] == heads
    backward = [group for way, group in harness.requests if way == "backward"]
    assert sorted(backward) == sorted(set(heads) - set(subset.bottom))


@pytest.mark.parametrize("tied", [False, True])
def test_a_large_output_head_leaves_in_slices(tied: bool, tmp_path: Path) -> None:
    vocabulary = 2 * HEAD_ROWS + 5
    sizes = SIZES | {"vocab_size": vocabulary, "tie_word_embeddings": tied}
    save_model(Family("llama", sizes), tmp_path)
    harness = SplitHarness(tmp_path)
    heads = ["lm_head", f"lm_head/{HEAD_ROWS}", f"lm_head/{2 * HEAD_ROWS}"]
    assert [group.name for group in harness.split.head] == heads
    assert [group.out_features for group in harness.split.head] == [HEAD_ROWS, HEAD_ROWS, 5]
    assert_faithful(harness)
    assert_nothing_held(harness)
    assert [group for way, group in harness.requests if way == "forward"][-3:] == heads
    assert [group for way, group in harness.requests if way == "backward"][:3] == heads


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_clients_own_linears_are_frozen_and_shared(name: str, tmp_path: Path) -> None:
    save_model(FAMILIES[name], tmp_path)
    harness = SplitHarness(tmp_path, outsource=("*.mlp.c_proj", "*.1.*") if name == "gpt2" else ("*.q_proj",))
    one, other = harness.replica(), harness.replica()
    run_step(one, packed(rows()), harness.snapshot(), seed=0)
    kinds = set()
    for module in harness.split.block_linears:
        mine, yours = (replica.model.get_base_model().get_submodule(module) for replica in (one, other))
        assert isinstance(mine, LoraLayer)
        base = mine.get_base_layer()
        kinds.add(type(base))
        assert not base.weight.requires_grad
        assert base.weight.grad is None
        assert yours.get_base_layer().weight is base.weight
    assert kinds == {RemoteLinear, Conv1D if name == "gpt2" else nn.Linear}


def test_nothing_is_sent_back_below_the_lowest_adapter_though_it_is_the_clients(tmp_path: Path) -> None:
    save_model(FAMILIES["llama"], tmp_path)
    settings = LoraConfig(r=2, target_modules=("layers.1.self_attn.q_proj",))
    harness = SplitHarness(tmp_path, settings, ("*.mlp.*",))
    run_step(harness.replica(), packed(rows()), harness.snapshot(), seed=0)
    assert [group for way, group in harness.requests if way == "backward"] == [
        f"{LLAMA}.1.mlp.down_proj",
        f"{LLAMA}.1.mlp.gate_proj",
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_fresh_adapter_is_the_same_whatever_leaves(name: str, tmp_path: Path) -> None:
    save_model(FAMILIES[name], tmp_path)
    whole, part = (
        adapter_parameters(add_adapter(split_model(resolve(str(tmp_path)), (p,)), LoraConfig(r=4), 3))
        for p in ("*", "*.1.mlp.*")
    )
    assert list(whole) == list(part)
    assert all(torch.equal(whole[name], part[name]) for name in whole)


@pytest.mark.parametrize(
    "patterns",
    [("*.nope",), ("*", "down_proj"), ("model.lm_head",), ("*.Mlp.*",), ("model.layers.2.*",), ("",)],
)
def test_a_pattern_that_matches_nothing_is_refused(patterns: tuple[str, ...], tmp_path: Path) -> None:
    save_model(FAMILIES["llama"], tmp_path)
    with pytest.raises(UsageError) as caught:
        split_model(resolve(str(tmp_path)), patterns)
    assert caught.value.field == "outsource"
    assert repr(patterns[-1]) in caught.value.what
    assert f"{LLAMA}.0.mlp.down_proj" in caught.value.hint
    assert "hetrain plan" in caught.value.hint
