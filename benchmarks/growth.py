"""Growth of cost with tokens, matrix size and layers: ``python -m benchmarks.growth --json FILE``.

Client and worker take turns in this process, each with all cores, through the queue's messages but without a
queue. Tokens and matrix size: one product. Layers: forward and backward pass of a random Llama with LoRA.
Hints are made before; verification counts as decryption. Cases run in turn, round after round; figures are
medians.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.engines_under_test import EngineUnderTest, open_engine_under_test
from benchmarks.environment import environment
from benchmarks.local_job import LocalJob
from benchmarks.output import add_json_option, markdown, rounds, write
from benchmarks.shapes import write_random_llama
from benchmarks.workloads import Workload, random_workload
from hetrain.config import LoraConfig
from hetrain.data.packing import MicroBatch, micro_batches
from hetrain.data.tokenization import Row
from hetrain.nn.lora import adapter_parameters, add_adapter
from hetrain.nn.replica import Replica
from hetrain.nn.split import split_model
from hetrain.public.allocator import keep_freed_memory
from hetrain.public.lattice.parameters import SLOTS
from hetrain.public.model.files import resolve
from hetrain.public.protocol.product import Product
from hetrain.secret.verification.job import Verification, kept_rows
from hetrain.train.step import run_step
from hetrain.train.updater import Snapshot
from worker_gpu.device import Compute, choose_compute, choose_device

ENGINE = "rlwe"
_SEED = 7
_LLAMA_TOKENS, _LLAMA_WIDTH, _VOCABULARY = 512, 256, 1024
Figures = dict[str, float]


def by_tokens(
    folder: Path, compute: Compute, tokens: list[int], size: int
) -> dict[Any, Callable[[], Figures]]:
    """Products of one size × size matrix with growing operands."""
    workload = random_workload(f"tokens-{size}", size, size, folder)
    engine = open_engine_under_test(ENGINE, workload, compute)
    return {("tokens", count): partial(_product, engine, workload, count) for count in tokens}


def by_size(
    folder: Path, compute: Compute, sizes: list[int], tokens: int
) -> dict[Any, Callable[[], Figures]]:
    """Products of growing square matrices with operands of `tokens` tokens."""
    workloads = {size: random_workload(f"size-{size}", size, size, folder) for size in sizes}
    return {
        ("size", size): partial(_product, open_engine_under_test(ENGINE, workload, compute), workload, tokens)
        for size, workload in workloads.items()
    }


def _product(engine: EngineUnderTest, workload: Workload, tokens: int) -> Figures:
    one = engine.multiply(workload.x[:tokens])
    seconds = (one.encrypt_s, one.worker_s, one.decrypt_s)
    return _figures(sum(seconds), seconds, one.bytes_up, one.bytes_down)


def _figures(total: float, parts: tuple[float, float, float], bytes_up: int, bytes_down: int) -> Figures:
    names = ("encrypt_s", "worker_s", "decrypt_s")
    return {
        "seconds": total,
        **dict(zip(names, parts, strict=True)),
        "bytes_up": bytes_up,
        "bytes_down": bytes_down,
    }


def by_layers(folder: Path, compute: Compute, layers: list[int]) -> dict[Any, Callable[[], Figures]]:
    """Steps of random Llamas with growing numbers of blocks, 512 tokens each."""
    found: dict[Any, Callable[[], Figures]] = {}
    tokens = torch.randint(0, _VOCABULARY, (_LLAMA_TOKENS,)).tolist()
    row = Row(tuple(tokens), (False,) + (True,) * (len(tokens) - 1), 1)
    (batch,) = micro_batches([row], [(0,)])
    for count in layers:
        directory = folder / f"llama-{count}"
        directory.mkdir()
        write_random_llama(directory, _config(count))
        found["layers", count] = partial(_step, *_replica(directory, compute), batch)
    return found


def _config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_LLAMA_WIDTH,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


def _replica(directory: Path, compute: Compute) -> tuple[Replica, Snapshot]:
    """A client with an adapter, and a worker behind its channel."""
    matrices: dict[str, torch.Tensor] = {}
    split = split_model(
        resolve(str(directory)), on_matrix=lambda group, matrix: matrices.update({group.name: matrix})
    )
    kept = {
        key: rows
        for group in split.plan.groups
        for key, rows in kept_rows(group, matrices[group.name]).items()
    }

    def weights(product: Product) -> torch.Tensor:
        matrix = matrices[product.group.name]
        return matrix if product.direction == "forward" else matrix.t()

    job = LocalJob(ENGINE, split.plan, directory, Verification(kept, weights), compute)
    model = add_adapter(split, LoraConfig(), _SEED)
    values = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}
    return Replica(split, model, job.channel, job.sealer), Snapshot(values)


def _step(replica: Replica, snapshot: Snapshot, batch: MicroBatch) -> Figures:
    result = run_step(replica, batch, snapshot, _SEED)
    stats = result.stats
    parts = (stats.encrypt_s, stats.server_s, stats.verify_s + stats.decrypt_s)
    return _figures(result.seconds, parts, stats.bytes_up, stats.bytes_down)


def table(figures: Mapping[str, Any]) -> str:
    """The figures in Markdown."""
    header = ("grows with", "", "seconds", "encrypt", "worker", "decrypt", "MB up", "MB down")
    rows = []
    for one in figures["cases"]:
        seconds = [f"{one[part]:.3f}" for part in ("seconds", "encrypt_s", "worker_s", "decrypt_s")]
        megabytes = [f"{one[part] / 1e6:.2f}" for part in ("bytes_up", "bytes_down")]
        rows.append((one["axis"], str(one["value"]), *seconds, *megabytes))
    return markdown(header, rows)


def main() -> None:
    """Parses arguments, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_json_option(parser)
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 512, 1024, 2048])
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 1024, 2048, 4096])
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5, help="rounds over all cases")
    arguments = parser.parse_args()
    if min(arguments.tokens) < 1 or max(arguments.tokens) > SLOTS or arguments.repeats < 1:
        parser.error(f"--tokens is 1 to {SLOTS}, --repeats at least 1")
    if min(arguments.sizes) < 1 or min(arguments.layers) < 1:
        parser.error("--sizes and --layers are at least 1")
    before = environment()
    keep_freed_memory()
    compute = choose_compute(choose_device())
    # Along the other axis: the middle of the sizes, the most of the tokens.
    size, tokens = sorted(arguments.sizes)[len(arguments.sizes) // 2], max(arguments.tokens)
    with tempfile.TemporaryDirectory() as workspace:
        folder = Path(workspace)
        work = by_tokens(folder, compute, arguments.tokens, size)
        work |= by_size(folder, compute, arguments.sizes, tokens)
        work |= by_layers(folder, compute, arguments.layers)
        measured = rounds(work, arguments.repeats)
    cases = [
        {"axis": axis, "value": value} | {name: median(one[name] for one in given) for name in given[0]}
        for (axis, value), given in measured.items()
    ]
    figures = {
        "matrix_size": size,
        "tokens": tokens,
        "llama_tokens": _LLAMA_TOKENS,
        "llama_hidden_size": _LLAMA_WIDTH,
        "repeats": arguments.repeats,
        "worker": compute.description,
        "cases": cases,
        "environment": before,
        "load_after": os.getloadavg(),
    }
    print(table(figures))
    write(figures, arguments.json)


if __name__ == "__main__":
    main()
