"""Tiny models of every family, run split and as stock transformers and peft run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hetrain.config import LoraConfig
from hetrain.data.packing import MicroBatch, micro_batches
from hetrain.data.shared_prompt import shared_prompts
from hetrain.data.tokenization import Row
from hetrain.nn.lora import adapter_parameters, add_adapter
from hetrain.nn.remote import RemoteLinear
from hetrain.nn.replica import Replica
from hetrain.nn.split import SplitModel, split_model
from hetrain.public.model.files import resolve
from hetrain.public.model.quantization import QuantizedMatrix, quantize
from hetrain.public.protocol.messages import EvaluateTask
from hetrain.public.protocol.product import Product, ProductKey
from hetrain.secret.engines.clear import ClearSealer
from hetrain.secret.verification.job import Verification, kept_rows
from hetrain.secret.verification.rows import CheckRows
from hetrain.train.step import run_step
from hetrain.train.updater import Snapshot
from hetrain.transport.in_process import InProcessChannel
from worker_gpu.device import Compute
from worker_gpu.kernels import KERNELS
from worker_gpu.service import Service
from worker_gpu.weights.store import WeightStore

VOCABULARY = 101
WINDOW = 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
WIDE_HEADS = {**GROUPED, "head_dim": 16}
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
OPT_SIZES = {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 24}
DEEPSEEK_SIZES = {
    **SIZES,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}


def dequantised(matrix: QuantizedMatrix) -> torch.Tensor:
    """diag(s)·Q·diag(c)."""
    return matrix.scales.outputs[:, None] * matrix.values * matrix.scales.inputs


@dataclass(frozen=True)
class Family:
    """An architecture: transformers' model type and a tiny configuration."""

    model_type: str
    config: Mapping[str, Any]


FAMILIES = {
    "llama": Family("llama", GROUPED),
    "llama-biased": Family("llama", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "qwen2": Family("qwen2", GROUPED),
    "qwen3": Family("qwen3", WIDE_HEADS),
    "mistral": Family("mistral", {**GROUPED, "sliding_window": WINDOW}),
    "ministral": Family("ministral", {**WIDE_HEADS, **ALTERNATING}),
    "gemma": Family("gemma", WIDE_HEADS),
    "gemma2": Family("gemma2", {**WIDE_HEADS, **ALTERNATING, "attn_logit_softcapping": 5.0}),
    "gemma3": Family("gemma3_text", {**WIDE_HEADS, **ALTERNATING}),
    "phi": Family("phi", GROUPED),
    "phi3": Family("phi3", {**GROUPED, "sliding_window": WINDOW}),
    "stablelm": Family("stablelm", GROUPED),
    "stablelm-parallel": Family("stablelm", {**GROUPED, "qk_layernorm": True, "use_parallel_residual": True}),
    "olmo": Family("olmo", GROUPED),
    "olmo2": Family("olmo2", GROUPED),
    "olmo3": Family("olmo3", {**GROUPED, **ALTERNATING}),
    "granite": Family(
        "granite", {**GROUPED, "logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}
    ),
    "cohere": Family("cohere", {**GROUPED, "use_qk_norm": True}),
    "cohere2": Family("cohere2", {**GROUPED, **ALTERNATING}),
    "gpt-neox": Family("gpt_neox", SIZES),
    "gpt-neox-serial": Family("gpt_neox", {**SIZES, "use_parallel_residual": False}),
    "gpt2": Family("gpt2", GPT2_SIZES),
    "gpt-bigcode": Family("gpt_bigcode", GPT2_SIZES),
    "opt": Family("opt", OPT_SIZES),
    "starcoder2": Family("starcoder2", {**GROUPED, "sliding_window": WINDOW}),
    "smollm3": Family("smollm3", GROUPED),
    "glm4": Family("glm4", {**WIDE_HEADS, "num_key_value_heads": 2}),
    "nemotron": Family("nemotron", GROUPED),
    "exaone4": Family("exaone4", {**GROUPED, **ALTERNATING}),
    "deepseek-v3-dense": Family("deepseek_v3", DEEPSEEK_SIZES),
}


def save_model(family: Family, directory: Path, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A random model whose biases and norms are random too, saved to `directory`."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family.model_type, **family.config, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory, **options)
    return model


class SplitHarness:
    """A split model with a random adapter, on the real worker service; records the products it computes."""

    def __init__(
        self, directory: Path, settings: LoraConfig | None = None, outsource: Sequence[str] | None = None
    ) -> None:
        self.directory = directory
        checkpoint = resolve(str(directory))
        kept: dict[ProductKey, CheckRows] = {}
        self.split: SplitModel = split_model(
            checkpoint,
            outsource,
            lambda group, matrix: kept.update(kept_rows(group, matrix)),
        )
        self.sealer = ClearSealer(Verification(kept, self._weights))
        self.model = add_adapter(self.split, settings or LoraConfig(r=4, alpha=8), seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapter_parameters(self.model).values():
                parameter.normal_(std=0.2, generator=generator)
        self.requests: list[tuple[str, str]] = []
        self.sizes: dict[tuple[str, str], int] = {}  # bytes of the last operand
        compute = Compute(torch.device("cpu"), "int8", KERNELS["int8"])
        self._service = Service(compute, WeightStore(compute.device, {checkpoint.label: str(directory)}))
        self._plan = self.split.plan.to_bytes()
        self.channel = InProcessChannel(
            self._evaluate, lambda task, plan: self._service.prepare(task, lambda: plan)
        )
        self.channel.prepare(self.split.plan.model, "clear", self._plan, self.split.plan.digest)

    def _evaluate(self, task: EvaluateTask, payload: memoryview) -> list[memoryview]:
        self.requests.append((task.direction, task.group))
        self.sizes[task.direction, task.group] = len(payload)
        return self._service.evaluate(task, lambda: self._plan, memoryview(bytearray(payload)))

    def replica(self) -> Replica:
        return Replica(self.split, self.model, self.channel, self.sealer)

    def _weights(self, product: Product) -> torch.Tensor:
        raise AssertionError(f"one worker computes everything, so the weights of {product} are not needed")

    def snapshot(self) -> Snapshot:
        return Snapshot({name: p.detach().clone() for name, p in adapter_parameters(self.model).items()})

    def stock(self) -> PreTrainedModel:
        """The model as transformers loads it, its outsourced matrices rounded to int8 and back."""
        model = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32)
        with torch.no_grad():
            for group in self.split.plan.groups:
                weights = []
                for member in group.members:
                    linear = model.get_submodule(member.module)
                    assert member.transposed == isinstance(linear, Conv1D)
                    if linear is model.get_output_embeddings() and member.first == 0:
                        # Embeddings that share its matrix stay as they are.
                        linear.weight = torch.nn.Parameter(linear.weight.detach().clone())
                    weight = linear.weight.t() if member.transposed else linear.weight
                    weights.append(weight[member.first : member.end])
                rounded = dequantised(quantize(torch.cat(weights)))
                for weight, part in zip(weights, rounded.split([len(w) for w in weights]), strict=True):
                    weight.copy_(part)
        return model.eval()

    def stock_peft(self) -> PeftModel:
        """`stock` with the same adapter, placed by peft alone."""
        config = peft.LoraConfig(
            r=4,
            lora_alpha=8,
            lora_dropout=0.0,
            target_modules=list(self.split.block_linears),
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(self.stock(), config).eval()
        parameters = adapter_parameters(model)
        values = self.snapshot().values
        assert parameters.keys() == values.keys()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(values[name])
        return model


def rows(lengths: tuple[int, ...] = (13, 6, 9)) -> list[Row]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for line, length in enumerate(lengths):
        tokens = tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())
        found.append(Row(tokens, tuple(place >= 2 for place in range(length)), line))
    return found


def prompted_rows(prompt: int = 6, lengths: tuple[int, ...] = (13, 6, 9, 1)) -> list[Row]:
    """As `rows`, each after the same tokens, which are learned but for the first, and one row without."""
    beginning, *others = rows((prompt, *lengths))
    found = []
    for row in others:
        tokens = beginning.tokens + row.tokens
        found.append(Row(tokens, (False,) + (True,) * (len(tokens) - 1), row.line))
    return [found[0], rows((5,))[0], *found[1:]]


def packed(some_rows: list[Row], *, share: bool = True) -> MicroBatch:
    prompts = shared_prompts(some_rows) if share else None
    return next(micro_batches(some_rows, [range(len(some_rows))], prompts))


def stock_loss(model: torch.nn.Module, row: Row) -> torch.Tensor:
    """Σ −log p over the row's targets, straight from the model's logits."""
    logits = model(input_ids=torch.tensor([row.tokens]), use_cache=False).logits[0, :-1].float()
    targets, counts = torch.tensor(row.tokens[1:]), torch.tensor(row.supervised[1:])
    return cross_entropy(logits[counts], targets[counts], reduction="sum")


def assert_faithful(harness: SplitHarness, some_rows: list[Row] | None = None) -> None:
    """Loss and gradients of packed rows equal the sum of what stock peft gives for each row alone."""
    some_rows = some_rows or rows()
    result = run_step(harness.replica(), packed(some_rows), harness.snapshot(), seed=0)
    reference = harness.stock_peft()
    losses = [stock_loss(reference, row) for row in some_rows]
    sum(losses).backward()
    assert result.summed_loss == pytest.approx(sum(loss.item() for loss in losses), rel=1e-4)
    expected = {name: p.grad for name, p in adapter_parameters(reference).items()}
    assert result.gradients.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (result.gradients[name] - gradient).norm()
        assert error <= 1e-3 * gradient.norm() + 1e-6 * largest, name


def assert_nothing_held(harness: SplitHarness) -> None:
    """No outsourced matrix lies on the client."""
    causal = harness.replica().model.get_base_model()
    outsourced = {member.module for group in harness.split.plan.groups for member in group.members}
    remotes = {
        name.removesuffix(".base_layer"): m
        for name, m in causal.named_modules()
        if isinstance(m, RemoteLinear)
    }
    assert remotes.keys() == outsourced
    embedding = causal.get_input_embeddings().weight
    remotes = {name: module for name, module in remotes.items() if module.weight is not embedding}
    assert all(module.weight.untyped_storage().nbytes() == 4 for module in remotes.values())
    total = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(harness.directory).parameters())
    matrices = sum(module.in_features * module.out_features for module in remotes.values())
    assert harness.split.client_parameters == total - matrices
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in causal.parameters()}
    lora = sum(p.untyped_storage().nbytes() for p in adapter_parameters(causal).values())
    assert sum(held.values()) <= 4 * (harness.split.client_parameters + len(remotes)) + lora
