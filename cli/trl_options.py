"""Options of TRL's `trl sft` and of transformers' trainer that hetrain does not have under the same name.

Each is in one table: it is renamed, or translated, or has no effect here for the values with which that is
true and harmless, or is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

SYNONYMS: Mapping[str, str] = MappingProxyType(
    {
        "dataset_name": "dataset",
        "max_seq_length": "max_length",
        "evaluation_strategy": "eval_strategy",
    }
)


@dataclass(frozen=True)
class Rule:
    """What becomes of an option.

    Attributes:
        reason: why it has no effect, or is refused.
        harmless: the values with which it is accepted without effect.
        any_value: all values are.
    """

    reason: str
    harmless: tuple[Any, ...] = ()
    any_value: bool = False

    def accepts(self, value: Any) -> bool:
        """Whether the option may stand there, since what it asks for is so, or changes no result."""
        # True equals 1 and False 0 in Python, but not here.
        return self.any_value or any(
            value == each and isinstance(value, bool) == isinstance(each, bool) for each in self.harmless
        )


def _off(reason: str) -> Rule:
    return Rule(reason, (False, "", 0, 0.0))


def _on(reason: str) -> Rule:
    return Rule(reason, (True,))


def _only(reason: str, *values: Any) -> Rule:
    return Rule(reason, values)


def _unused(reason: str) -> Rule:
    return Rule(reason, any_value=True)


_PRECISION = "activations leave encrypted as integers, and the client computes in float32"
_WEIGHTS = "workers hold the weights in int8, the client its own in the model's type"
_ONE_CLIENT = "one process trains, and finds its workers through the broker"
_LOG = "every micro-batch is logged in metrics.jsonl"
_HUB = "nothing is uploaded: the adapter in output_dir is a PEFT adapter, which you may upload"
_MEMORY = "the client keeps what it needs in half precision, and computes the rest again"
_OWN_LAYERS = "hetrain has layers of its own, which compute the same"
_LOADER = "rows are read and tokenized before training starts"
_EVALUATION = "held-out rows are packed like the others: their loss is the mean over all tokens"
_DECODER = "the adapters are on the linears of decoder blocks"
_ADAMW = "the optimizer is torch's AdamW"
_EVAL = "give eval_strategy, and eval_dataset or validation_split"
_SHUFFLE = "each pass shuffles the rows by seed"

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        # data
        "dataset_streaming": _off(_LOADER),
        "dataset_num_proc": _unused(_LOADER),
        "dataset_kwargs": _only("rows are tokenized as TRL does by default", {}),
        "datasets": _only("give dataset"),
        "streaming": _off(_LOADER),
        "shuffle_dataset": _unused(_SHUFFLE),
        "data_seed": _only(_SHUFFLE),
        "train_sampling_strategy": _only(_SHUFFLE, "random"),
        "group_by_length": _off(_SHUFFLE),
        "length_column_name": _only(_SHUFFLE, "length"),
        "remove_unused_columns": _on("columns that are not used are left out"),
        "label_names": _only("targets are the tokens themselves"),
        "packing": _unused("rows are packed without padding, each whole and unseen by the others"),
        "packing_strategy": _only("rows are packed whole, never cut to fill a block", "bfd"),
        "eval_packing": _unused(_EVALUATION),
        "padding_free": _unused("micro-batches have no padding"),
        "pad_to_multiple_of": _only("micro-batches have no padding"),
        "pad_token": _unused("micro-batches have no padding"),
        "eos_token": _only("it is that of the model's tokenizer"),
        "chat_template_path": _only("the chat template is that of the model"),
        "truncation_mode": _only("rows are cut at their end", "keep_start"),
        "dataloader_drop_last": _off("every row is learned"),
        "dataloader_num_workers": _unused(_LOADER),
        "dataloader_pin_memory": _unused(_LOADER),
        "dataloader_persistent_workers": _unused(_LOADER),
        "dataloader_prefetch_factor": _unused(_LOADER),
        "dataloader_multiprocessing_context": _unused(_LOADER),
        "dataloader_in_order": _unused(_LOADER),
        "ignore_data_skip": _off("a run that goes on skips the rows that were learned"),
        # model and adapter
        "model_revision": _only("give a directory with the revision", "main"),
        "model_init_kwargs": _only("models are loaded in one way", {}),
        "trust_remote_code": _off("no code of a model or a data set is run"),
        "dtype": _only(_WEIGHTS, "auto", "float32"),
        "torch_dtype": _only(_WEIGHTS, "auto", "float32"),
        "attn_implementation": _unused(_OWN_LAYERS),
        "use_liger_kernel": _unused(_OWN_LAYERS),
        "liger_kernel_config": _unused(_OWN_LAYERS),
        "torch_compile": _unused(_OWN_LAYERS),
        "torch_compile_backend": _unused(_OWN_LAYERS),
        "torch_compile_mode": _unused(_OWN_LAYERS),
        "use_cache": _unused("training keeps no cache of keys and values"),
        "use_peft": _on("what is trained is always a LoRA adapter"),
        "lora_task_type": _only("models are causal language models", "CAUSAL_LM"),
        "lora_modules_to_save": _only(_DECODER, []),
        "lora_target_parameters": _only(_DECODER, []),
        "use_dora": _off("it needs the matrices, which are with the workers"),
        "load_in_4bit": _off(_WEIGHTS),
        "load_in_8bit": _off(_WEIGHTS),
        "bnb_4bit_quant_type": _unused(_WEIGHTS),
        "bnb_4bit_quant_storage": _unused(_WEIGHTS),
        "use_bnb_nested_quant": _off(_WEIGHTS),
        "router_aux_loss_coef": _off("the loss is the cross-entropy of the targets"),
        "ignore_bias_buffers": _unused(_ONE_CLIENT),
        # precision and memory
        "bf16": _off(_PRECISION),
        "fp16": _off(_PRECISION),
        "bf16_full_eval": _off(_PRECISION),
        "fp16_full_eval": _off(_PRECISION),
        "tf32": _off(_PRECISION),
        "gradient_checkpointing": _unused(_MEMORY),
        "gradient_checkpointing_kwargs": _unused(_MEMORY),
        "activation_checkpointing": _unused(_MEMORY),
        "activation_checkpointing_kwargs": _unused(_MEMORY),
        "activation_offloading": _unused(_MEMORY),
        "torch_empty_cache_steps": _unused(_MEMORY),
        "auto_find_batch_size": _off("a micro-batch has the size that is given"),
        # optimizer and loss
        "optim": _only(_ADAMW, "adamw_torch", "adamw_torch_fused", "adamw_hf"),
        "optim_args": _only(_ADAMW, ""),
        "optim_target_modules": _only(_ADAMW),
        "adam_beta1": _only(_ADAMW, 0.9),
        "adam_beta2": _only(_ADAMW, 0.999),
        "adam_epsilon": _only(_ADAMW, 1e-8, "1e-8", "1e-08"),
        "lr_scheduler_kwargs": _only("schedules have no arguments but warm-up", {}, ""),
        "label_smoothing_factor": _off("the loss is the cross-entropy of the targets"),
        "loss_type": _only("the loss is the cross-entropy of the targets", "nll", "chunked_nll"),
        "neftune_noise_alpha": _only("embeddings get no noise"),
        "average_tokens_across_devices": _unused("the loss of an update is the mean over all its tokens"),
        # evaluation
        "do_train": _on("a job trains"),
        "do_eval": _off(_EVAL),
        "do_predict": _off("`hetrain ask` answers"),
        "per_device_eval_batch_size": _unused(_EVALUATION),
        "eval_accumulation_steps": _unused(_EVALUATION),
        "eval_do_concat_batches": _unused(_EVALUATION),
        "eval_use_gather_object": _unused(_EVALUATION),
        "prediction_loss_only": _unused(_EVALUATION),
        "batch_eval_metrics": _unused(_EVALUATION),
        "include_for_metrics": _only(_EVALUATION, []),
        "eval_delay": _off(_EVAL),
        "eval_on_start": _off("`hetrain eval` evaluates the base model"),
        "metric_for_best_model": _only("it is the loss of the held-out rows", "loss", "eval_loss"),
        "greater_is_better": _off("the least loss is the best"),
        # logging and saving
        "logging_strategy": _unused(_LOG),
        "logging_steps": _unused(_LOG),
        "logging_first_step": _unused(_LOG),
        "logging_nan_inf_filter": _unused(_LOG),
        "logging_dir": _only("TensorBoard's files are in runs/ of output_dir"),
        "include_num_input_tokens_seen": _unused(_LOG),
        "log_level": _unused("--quiet and --debug say how much is printed"),
        "log_level_replica": _unused(_ONE_CLIENT),
        "log_on_each_node": _unused(_ONE_CLIENT),
        "disable_tqdm": _unused("--quiet turns the progress line off"),
        "run_name": _only("a run is named by the last part of output_dir"),
        "project": _only("W&B's project is set by WANDB_PROJECT"),
        "trackio_space_id": _only("report_to knows tensorboard and wandb"),
        "trackio_bucket_id": _only("report_to knows tensorboard and wandb"),
        "trackio_static_space_id": _only("report_to knows tensorboard and wandb"),
        "save_strategy": _only("give save_steps", "steps"),
        "save_only_model": _off("a checkpoint holds what a run needs to go on"),
        "save_safetensors": _on("adapters are written as safetensors"),
        "save_on_each_node": _unused(_ONE_CLIENT),
        "enable_jit_checkpoint": _off("SIGTERM always writes a checkpoint"),
        "restore_callback_states_from_checkpoint": _unused("early stopping goes on where it was"),
        "push_to_hub": _off(_HUB),
        "hub_token": _only(_HUB),
        "hub_private_repo": _only(_HUB),
        "hub_model_id": _only(_HUB),
        "hub_strategy": _unused(_HUB),
        "hub_always_push": _off(_HUB),
        "hub_revision": _only(_HUB),
        # machines
        "full_determinism": _off("encryption draws fresh noise in every run"),
        "use_cpu": _on("give device for another one than the CPU"),
        "no_cuda": _on("give device for another one than the CPU"),
        "local_rank": _only(_ONE_CLIENT, -1, 0),
        "accelerator_config": _only(_ONE_CLIENT, {}),
        "parallelism_config": _only(_ONE_CLIENT, {}),
        "deepspeed": _only(_ONE_CLIENT, ""),
        "fsdp": _only(_ONE_CLIENT, "", [], False),
        "fsdp_config": _only(_ONE_CLIENT, {}, ""),
        "ddp_find_unused_parameters": _unused(_ONE_CLIENT),
        "ddp_bucket_cap_mb": _unused(_ONE_CLIENT),
        "ddp_broadcast_buffers": _unused(_ONE_CLIENT),
        "ddp_static_graph": _unused(_ONE_CLIENT),
        "ddp_backend": _unused(_ONE_CLIENT),
        "ddp_timeout": _unused(_ONE_CLIENT),
        "debug": _only("`hetrain --debug` prints tracebacks", "", []),
        "skip_memory_metrics": _unused(_LOG),
    }
)


@dataclass
class Translated:
    """A file's options in hetrain's words.

    Attributes:
        values: what is taken, by the names of hetrain's options or of ones that nobody knows.
        spelled: the name in the file of each of them.
        without_effect: what is accepted and changes nothing, with the reason.
        refused: what is not, with the reason.
    """

    values: dict[str, Any] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)
    without_effect: dict[str, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)


def translate(given: Mapping[str, Any]) -> Translated:
    """Options as TRL names and means them, in hetrain's words. None stands for TRL's default.

    Args:
        given: the options of a file, by their names with underscores.
    """
    found = Translated()
    for name, value in given.items():
        own, meant = _in_own_words(name, value, given)
        rule = RULES.get(own)
        if rule is None:
            found.values[name], found.spelled[name] = meant, own
        elif value is None or rule.accepts(value):
            found.without_effect[name] = rule.reason
        else:
            found.refused.append(f"{name} has no meaning here: {rule.reason}")
    says_how_many = {"gradient_accumulation_steps", "batch_tokens"} & {*given}
    if "per_device_train_batch_size" in given and not says_how_many:
        found.values["gradient_accumulation_steps"] = 1  # TRL's default, of which batch_tokens knows nothing
        found.spelled["gradient_accumulation_steps"] = "gradient_accumulation_steps"
    if (held_out := _evaluated_by_trl(found)) is not None:
        found.values["eval_dataset"], found.spelled["eval_dataset"] = held_out, "eval_dataset"
    return found


def _evaluated_by_trl(found: Translated) -> str | None:
    """The data set on the hub whose test split TRL evaluates, where nothing else is named."""
    name = found.values.get("dataset_name")
    strategy = next((found.values[key] for key, own in found.spelled.items() if own == "eval_strategy"), "no")
    named = {"eval_dataset", "validation_split"} & {*found.values}
    if strategy == "no" or named or not isinstance(name, str) or Path(name).exists():
        return None
    return name


def _in_own_words(name: str, value: Any, given: Mapping[str, Any]) -> tuple[str, Any]:
    """The option of hetrain that an option of TRL stands for, and its value."""
    match name, value:
        case "warmup_steps", float() if 0 < value < 1:  # transformers takes both in one option
            return "warmup_ratio", value
        case "resume_from_checkpoint", bool():
            return name, "latest" if value else None
        case "save_strategy", "no" | False:  # YAML reads a bare no as false
            return "save_steps", 0
        case "eval_strategy" | "evaluation_strategy", False:
            return "eval_strategy", "no"
        case "report_to", []:
            return name, "none"
        case "per_device_train_batch_size", int() if given.get("packing") is True:
            # Then a row of a batch is a block of max_length tokens.
            length = given.get("max_length", given.get("max_seq_length")) or _TRL_MAX_LENGTH
            return "micro_batch_tokens", value * length
    return SYNONYMS.get(name, name), value


_TRL_MAX_LENGTH = 1024
