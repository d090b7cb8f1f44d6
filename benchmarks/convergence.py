"""Do encrypted and plain training agree? ``python -m benchmarks.convergence --json FILE``.

The same micro-batches, adapter, optimizer and schedule with stock peft in fp32 and with each engine over the
real queue, in lock step. Reports losses step by step, their largest relative difference from plain, and the
cosine similarity of the first step's gradients.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from benchmarks.data import HANDBOOK, write_text_rows
from benchmarks.environment import environment
from benchmarks.output import add_json_option, write
from benchmarks.plain import plain_model, plain_step
from hetrain.config import LoraConfig, OutsourcingConfig, TrainingConfig
from hetrain.data.packing import MicroBatch, epochs
from hetrain.data.tokenization import read_rows
from hetrain.nn.lora import adapter_parameters, add_adapter
from hetrain.nn.split import split_model
from hetrain.public.lattice.ring import RESULT_BITS
from hetrain.public.system import available_cores
from hetrain.train.session import BaseModelFiles, open_base, open_session
from hetrain.train.step import run_step, share_cores
from hetrain.train.updater import Tensors, Updater

OPTIMIZER = TrainingConfig(learning_rate=1e-3)
SEED = 7
ROW_TOKENS = 512


@dataclass(frozen=True)
class Curve:
    """Losses of consecutive steps, and the gradients of the first step's summed loss."""

    losses: list[float]
    first_gradients: Tensors


def draw(base: BaseModelFiles, data: str, tokens: int, steps: int) -> list[MicroBatch]:
    """Micro-batches of running text in full rows, or of the handbook's short questions and answers."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rows.jsonl" if data == "text" else HANDBOOK
        if data == "text":
            write_text_rows(path, rows=4 * steps, tokens=ROW_TOKENS)
        rows = read_rows(path, base.tokenizer, ROW_TOKENS)
    return list(islice(epochs(rows, tokens, SEED, None), steps))


def initial_values(base: BaseModelFiles) -> dict[str, torch.Tensor]:
    """Adapter values that all runs start from. B is not zero: gradients reach A from the first step."""
    model = add_adapter(split_model(base.files), LoraConfig(), SEED)
    generator = torch.Generator().manual_seed(SEED)
    values = {}
    for name, parameter in adapter_parameters(model).items():
        fresh = parameter.detach().clone()
        values[name] = fresh.normal_(std=0.01, generator=generator) if "lora_B" in name else fresh
    return values


def plain_curve(base: BaseModelFiles, values: Tensors, batches: list[MicroBatch]) -> Curve:
    """With stock peft."""
    model = plain_model(base.files.directory, LoraConfig(), values)
    updater = Updater(adapter_parameters(model), OPTIMIZER, len(batches))
    losses, first = [], None
    for batch in batches:
        loss, gradients = plain_step(model, batch)
        first = first or gradients
        losses.append(loss)
        updater.apply([gradients], batch.n_targets)
    assert first is not None
    return Curve(losses, first)


def engine_curve(base: BaseModelFiles, engine: str, values: Tensors, batches: list[MicroBatch]) -> Curve:
    """With one engine, over an embedded broker and worker."""
    # One thread: client and worker take turns on this machine, and small operations gain nothing from two.
    share_cores(available_cores())
    with open_session(base, OutsourcingConfig(engine=engine), None, "cpu") as session:
        model = add_adapter(session.split, LoraConfig(), SEED)
        parameters = adapter_parameters(model)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(values[name])
        (replica,) = session.replicas(model, 1)
        updater = Updater(parameters, OPTIMIZER, len(batches))
        losses, first = [], None
        for batch in batches:
            result = run_step(replica, batch, updater.snapshot(), SEED)
            first = first or result.gradients
            losses.append(result.summed_loss / batch.n_targets)
            updater.apply([result.gradients], batch.n_targets)
    assert first is not None
    return Curve(losses, first)


def cosine(a: Tensors, b: Tensors) -> float:
    """Cosine similarity of two sets of gradients, all parameters side by side, in float64."""
    flat = [torch.cat([side[name].double().flatten() for name in sorted(a)]) for side in (a, b)]
    return float(torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0))


def largest_difference(a: Curve, b: Curve) -> float:
    """max over steps of |a - b| / b."""
    return max(abs(x - y) / y for x, y in zip(a.losses, b.losses, strict=True))


def main() -> None:
    """Parses arguments, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_json_option(parser)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per micro-batch")
    parser.add_argument("--data", choices=("text", "handbook"), default="text")
    arguments = parser.parse_args()
    base = open_base("smollm2-135m")
    batches = draw(base, arguments.data, arguments.tokens, arguments.steps)
    values = initial_values(base)
    before = environment()
    plain = plain_curve(base, values, batches)
    curves = {engine: engine_curve(base, engine, values, batches) for engine in ("clear", "rlwe")}
    figures = {
        "data": arguments.data,
        "tokens": arguments.tokens,
        "result_bits": RESULT_BITS,
        "losses": {"plain": plain.losses} | {engine: curve.losses for engine, curve in curves.items()},
        "first_step_difference": {
            engine: abs(curve.losses[0] - plain.losses[0]) / plain.losses[0]
            for engine, curve in curves.items()
        },
        "largest_difference": {engine: largest_difference(curve, plain) for engine, curve in curves.items()},
        "gradient_cosine": {
            "rlwe_clear": cosine(curves["rlwe"].first_gradients, curves["clear"].first_gradients),
            "rlwe_plain": cosine(curves["rlwe"].first_gradients, plain.first_gradients),
            "clear_plain": cosine(curves["clear"].first_gradients, plain.first_gradients),
        },
        "environment": before,
    }
    print(json.dumps(figures, indent=2))
    write(figures, arguments.json)


if __name__ == "__main__":
    main()
