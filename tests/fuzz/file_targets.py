"""Files that a stranger may have written or damaged: models, adapters, checkpoints, hints, rows."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save, save_file
from torch import nn
from transformers import LlamaConfig

from hetrain.config import DataConfig, TrainingConfig
from hetrain.data.dataset import read_raw_rows
from hetrain.data.sources import HubSplit
from hetrain.data.tokenization import load_tokenizer, tokenize_rows
from hetrain.export.gguf_adapter import LoraPair, read_pairs, write_pairs
from hetrain.export.gguf_names import TensorLayout
from hetrain.nn.adapter_files import CONFIG_FILE, JOB_FILE, base_model_of, read_job
from hetrain.public.errors import DatasetError, ModelError, UsageError
from hetrain.public.model.files import resolve
from hetrain.public.protocol.product import products_of
from hetrain.secret.engines.rlwe.hints import HintStore
from hetrain.train.checkpoint import (
    ADAPTER_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    SUMS_FILE,
    TrainerState,
    find_checkpoint,
    write_checkpoint,
)
from hetrain.train.records import EVALUATIONS_FILE, METRICS_FILE, last_evaluated, read_run
from hetrain.train.updater import Updater
from tests.fuzz.run import Opened, Target
from tests.harness.checkpoints import save_matrices

_SEED_FILE = "seed"
_ROWS = (
    {"prompt": "Who are you?", "completion": " A guide."},
    {"text": "A text to continue."},
    {"instruction": "Add", "input": "1 2", "output": "3"},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Ha"}],
     "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
     "chat_template_kwargs": {"enable_thinking": False}},
    {"messages": [{"role": "user", "content": "Hi"},
                  {"role": "assistant", "content": None, "tool_calls": [
                      {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
                  {"role": "tool", "content": "", "tool_call_id": "1", "name": "f"}]},
)  # fmt: skip


def _model(directory: Path, _: ExitStack) -> Opened:
    """model.safetensors: names, shapes and tensors."""
    model = directory / "tiny"
    model.mkdir()
    (model / "config.json").write_text("{}")
    generator = torch.Generator().manual_seed(1)
    tensors = {f"g{index}.weight": torch.randn(4, 6, generator=generator) for index in range(3)}

    def run(data: bytes) -> object:
        (model / "model.safetensors").write_bytes(data)
        return _read_all(model)

    seeds = [save(tensors), save({"a": torch.zeros(2, 0), "b": torch.ones(3, dtype=torch.bfloat16)})]
    return Opened([*seeds, save(tensors, {"format": "pt"})], run)


def _read_all(model: Path) -> list[tuple[int, ...]]:
    files = resolve(str(model))
    return [files.shape(name) for name in files.tensors if len(files.read(name).shape) >= 0]


def _index(directory: Path, _: ExitStack) -> Opened:
    """config.json and model.safetensors.index.json, whichever it could be."""
    model = directory / "tiny"
    save_matrices(model)
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {f"g{n}.weight": "model.safetensors" for n in range(3)},
    }
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8}

    def run(data: bytes) -> object:
        (model / "config.json").write_bytes(data)
        (model / "model.safetensors.index.json").write_bytes(data)
        return _read_all(model)

    return Opened([json.dumps(each).encode() for each in (index, config)], run)


def _gguf(directory: Path, _: ExitStack) -> Opened:
    """The GGUF of an adapter, as it is read back before it gets its name."""
    path = directory / "adapter.gguf"
    layout = TensorLayout(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=8))
    generator = torch.Generator().manual_seed(1)
    modules = [f"model.layers.0.self_attn.{name}_proj" for name in "qv"]
    a, b = torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator)
    write_pairs(path, {module: LoraPair(a, b, 2.0) for module in modules}, layout)
    valid = path.read_bytes()

    def run(data: bytes) -> object:
        path.write_bytes(data)
        return len(read_pairs(path, modules, layout))

    return Opened([valid], run)


def _hint_file(directory: Path, _: ExitStack) -> Opened:
    """The file of a hint, by its difference from a whole one: used if whole, else made again."""
    from tests.harness.engine import EngineHarness  # starts threads, which no fork survives

    generator = torch.Generator().manual_seed(1)
    harness = EngineHarness("rlwe", {"one": torch.randn(12, 24, generator=generator)}, directory / "tiny")
    store = harness.hints
    path = store.hint(next(products_of(harness.plan))).path
    valid = path.read_bytes()

    def run(data: bytes) -> object:
        path.write_bytes(data)
        missing = HintStore(store.directory).missing(harness.plan)
        if not missing and data[4096:] != valid[4096:]:
            raise AssertionError("a damaged hint was taken")
        return len(missing)

    return Opened([valid], run)


def _hint_seed(directory: Path, _: ExitStack) -> Opened:
    path = directory / _SEED_FILE

    def run(data: bytes) -> object:
        path.write_bytes(data)
        return HintStore(directory).directory

    return Opened([b"0123456789abcdef" * 4], run)


class _Checkpoint:
    """A checkpoint of a tiny adapter, and the updater that goes on from it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        generator = torch.Generator().manual_seed(1)
        self.parameters = {
            f"m.lora_{side}.default.weight": nn.Parameter(torch.randn(3, 4, generator=generator))
            for side in "AB"
        }
        updater = self.updater()
        gradients = {name: torch.ones_like(value) for name, value in self.parameters.items()}
        updater.apply([gradients], 1)
        state = TrainerState(
            identity={"seed": 1, "model": "tiny"},
            step=1,
            micro_batches=1,
            total_steps=2,
            skipped_updates=0,
            tokens=10,
            elapsed_s=1.0,
            schedule=dict(updater.schedule_state()),
        )
        values = {name.replace(".default.", "."): value.data for name, value in self.parameters.items()}
        write_checkpoint(
            directory, state, updater.optimizer_state(), lambda path: save_file(values, path / ADAPTER_FILE)
        )
        self.path = directory / "checkpoint-1"

    def updater(self) -> Updater:
        """A new one."""
        parameters = {name: nn.Parameter(value.data.clone()) for name, value in self.parameters.items()}
        return Updater(parameters, TrainingConfig(), 10)

    def read(self, name: str, data: bytes, *, sums: bool) -> Callable[[], object]:
        """Goes on from the checkpoint with other content in one of its files, and its sum if `sums`."""
        (self.path / name).write_bytes(data)
        if sums:
            files = sorted(path for path in self.path.iterdir() if path.name != SUMS_FILE)
            lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
            (self.path / SUMS_FILE).write_text("".join(lines))

        def run() -> object:
            checkpoint = find_checkpoint("latest", self.directory)
            checkpoint.require({"seed": 1, "model": "tiny"})
            updater = self.updater()
            checkpoint.restore(updater)
            updater.apply([{name: torch.ones_like(value) for name, value in self.parameters.items()}], 1)
            return updater.version

        return run


def _checkpoint(name: str, directory: Path, *, sums: bool = True) -> Opened:
    checkpoint = _Checkpoint(directory)
    seed = (checkpoint.path / name).read_bytes()
    return Opened([seed], lambda data: checkpoint.read(name, data, sums=sums)())


def _records(directory: Path, _: ExitStack) -> Opened:
    """What a run has recorded, and what an adapter of elsewhere says of itself."""
    job = {"model": "tiny", "model_path": None, "steps": 2, "dataset": ["rows.jsonl"], "status": "done"}
    line = {
        "step": 1,
        "loss": 2.5,
        "workers": {"a": 1.0},
        "dataset": ["rows.jsonl"],
        "data": {"strict": True},
    }
    config = {"base_model_name_or_path": "tiny", "peft_type": "LORA", "r": 8}

    def run(data: bytes) -> object:
        for name in (JOB_FILE, METRICS_FILE, EVALUATIONS_FILE, CONFIG_FILE):
            (directory / name).write_bytes(data)
        try:
            read_run(directory)
        except UsageError as error:
            if not str(error).isprintable():
                raise AssertionError("an error that is not printable") from error
        return read_job(directory), last_evaluated(directory), base_model_of(directory)

    return Opened([json.dumps(each).encode() for each in (job, line, config, job | config)], run)


def _rows(names: tuple[str, ...], seeds: list[bytes], directory: Path) -> Opened:
    """Rows under each of these names, which may decide what they are."""

    def run(data: bytes) -> object:
        path = directory / names[len(data) % len(names)]
        path.write_bytes(data)
        return read_raw_rows((str(path),), DataConfig(), HubSplit())

    return Opened(seeds, run)


def _json_rows(directory: Path, _: ExitStack) -> Opened:
    lines = [json.dumps(row).encode() for row in _ROWS]
    seeds = [*lines, b"\n".join(lines[:1] * 3), b"[%s]" % b", ".join(lines[3:4] * 2)]
    return _rows(("rows.jsonl", "rows.json", "rows"), seeds, directory)


def _csv_rows(directory: Path, _: ExitStack) -> Opened:
    seeds = [
        b'prompt,completion\n"a ""b""",c\nd,"e\nf"\n',
        b"text;other\nx;y\n",
        b'messages\t\n"[{""role"": ""user"", ""content"": ""a""}]"\t\n',
    ]
    return _rows(("rows.csv", "rows.tsv", "rows"), seeds, directory)


def _binary_rows(directory: Path, _: ExitStack) -> Opened:
    path = directory / "seed.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(_ROWS[0])] * 3), path)
    seeds = [path.read_bytes(), *(gzip.compress(json.dumps(row).encode(), mtime=0) for row in _ROWS[:4])]
    return _rows(("rows.jsonl.gz", "rows.parquet", "rows"), seeds, directory)


def _tokenized(directory: Path, _: ExitStack) -> Opened:
    """Rows as the chat template of SmolLM2 writes them, with and without the assistant's part marked."""
    tokenizer = load_tokenizer(resolve("smollm2-135m"))
    path = directory / "rows.jsonl"
    configs = (DataConfig(assistant_only_loss=True, strict=True), DataConfig())

    def run(data: bytes) -> object:
        path.write_bytes(data)
        for config in configs:
            with suppress(DatasetError, UsageError, ModelError) if config.strict else nullcontext():
                tokenize_rows(read_raw_rows((str(path),), config, HubSplit()), tokenizer, 64, config)
        return len(data)

    return Opened([json.dumps(row).encode() for row in _ROWS], run)


_ROWS_MAY = (DatasetError, UsageError)
FILE_TARGETS = (
    Target("safetensors", _model, (ModelError,), longest=1 << 16),
    Target("model-index", _index, (ModelError,)),
    Target("gguf", _gguf, (ModelError,), longest=1 << 16),
    Target("hint-file", _hint_file, (), longest=1 << 17),
    Target("hint-seed", _hint_seed, (UsageError,)),
    Target("checkpoint-state", lambda path, _: _checkpoint(STATE_FILE, path), (UsageError,)),
    Target("checkpoint-sums", lambda path, _: _checkpoint(SUMS_FILE, path, sums=False), (UsageError,)),
    Target(
        "checkpoint-adapter", lambda path, _: _checkpoint(ADAPTER_FILE, path), (UsageError,), longest=1 << 16
    ),
    Target(
        "checkpoint-optimizer",
        lambda path, _: _checkpoint(OPTIMIZER_FILE, path),
        (UsageError,),
        longest=1 << 16,
    ),
    Target("run-records", _records, (UsageError,)),
    Target("rows-json", _json_rows, _ROWS_MAY, lines=True),
    Target("rows-csv", _csv_rows, _ROWS_MAY, multiple=300, lines=True),
    Target("rows-binary", _binary_rows, _ROWS_MAY, multiple=3000, lines=True),
    Target(
        "rows-tokenized", _tokenized, (*_ROWS_MAY, ModelError), longest=1 << 16, multiple=3000, lines=True
    ),
)
