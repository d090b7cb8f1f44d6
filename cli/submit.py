"""`hetrain submit`: train an adapter."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.progress import TrainingDisplay


def submit(
    dataset: options.Dataset,
    model_name_or_path: options.Model = "smollm2-135m",
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="Where adapter and metrics go.")
    ] = Path("out"),
    engine: options.Engine = options.EngineName.rlwe,
    activation_bits: options.ActivationBits = None,
    hints: options.Hints = None,
    outsource: options.Outsource = ("*",),  # type: ignore[assignment]
    max_steps: Annotated[
        int,
        typer.Option(
            help="Optimizer updates; overrides the epochs when positive. One micro-batch makes an update, "
            "with --sync --in-flight of them do."
        ),
    ] = -1,
    num_train_epochs: Annotated[int, typer.Option(help="Passes over the data set.")] = 3,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 2e-4,
    lr_scheduler_type: Annotated[
        str, typer.Option(help="A schedule of transformers over the updates, e.g. linear, cosine.")
    ] = "linear",
    warmup_steps: Annotated[int, typer.Option(help="Updates of linear warm-up.")] = 0,
    max_grad_norm: Annotated[float, typer.Option(help="Clip gradients to this norm; 0 does not clip.")] = 1.0,
    seed: Annotated[
        int, typer.Option(help="Of adapter, shuffling and dropout; never of keys or noise.")
    ] = 42,
    lora_r: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    lora_alpha: Annotated[int, typer.Option(help="The adapter counts alpha/r times.")] = 32,
    lora_dropout: Annotated[float, typer.Option(help="Dropout before the adapter.")] = 0.0,
    lora_target_modules: Annotated[
        str, typer.Option(help="Comma-separated module name suffixes, or all-linear.")
    ] = "all-linear",
    max_length: options.MaxLength = 1024,
    micro_batch_tokens: options.MicroBatchTokens = 2048,
    in_flight: options.InFlight = 2,
    sync: Annotated[
        bool,
        typer.Option(
            "--sync", help="Lock step: micro-batches in flight share a snapshot and make one update."
        ),
    ] = False,
    max_staleness: Annotated[
        int | None,
        typer.Option(
            help="The most updates between a micro-batch's snapshot of the adapter and its own update; "
            "results that would break it wait. Default: 2·(in_flight − 1); 0: one micro-batch at a time.",
            show_default=False,
        ),
    ] = None,
    max_bytes_in_flight: options.MaxBytesInFlight = None,
    save_steps: Annotated[
        int,
        typer.Option(help="Updates between checkpoints; 0 writes one only when the run is stopped or fails."),
    ] = 50,
    save_total_limit: Annotated[
        int, typer.Option(help="Checkpoints that are kept, the newest ones; 0 keeps all.")
    ] = 2,
    resume_from_checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|latest",
            help="Go on from a checkpoint: its directory, or latest for that of the most updates in "
            "--output-dir. Give the same data set and options.",
            show_default=False,
        ),
    ] = None,
    broker_url: options.BrokerUrl = None,
    device: options.Device = "cpu",
    overwrite_output_dir: Annotated[
        bool, typer.Option("--overwrite-output-dir", help="Replace an adapter.")
    ] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Fine-tune a model with LoRA on workers that see only ciphertexts.

    Ctrl-C (or SIGTERM) once finishes the micro-batches in flight and writes adapter and checkpoint; twice
    leaves after the update at hand.
    """
    from hetrain.nn.lora import LoraSettings
    from hetrain.train.finetune import JobSpec, TrainingConfig
    from hetrain.train.finetune import submit as run
    from hetrain.train.settings import (
        BatchSettings,
        CheckpointSettings,
        FlightSettings,
        OptimizerSettings,
        OutsourcingSettings,
    )

    if quiet:
        logging.getLogger().setLevel(logging.ERROR)
    recipe = TrainingConfig(
        lora=LoraSettings(lora_r, lora_alpha, lora_dropout, _modules(lora_target_modules)),
        optimizer=OptimizerSettings(learning_rate, lr_scheduler_type, warmup_steps, max_grad_norm),
        batches=BatchSettings(micro_batch_tokens, max_length, num_train_epochs, max_steps, seed),
        flight=FlightSettings(in_flight, sync, max_staleness, max_bytes_in_flight),
        outsourcing=OutsourcingSettings(engine.value, activation_bits, tuple(outsource), hints),
        checkpoints=CheckpointSettings(save_steps, save_total_limit),
    )
    spec = JobSpec(
        dataset,
        model_name_or_path,
        broker_url,
        device,
        output_dir,
        overwrite_output_dir,
        resume_from_checkpoint,
    )
    with TrainingDisplay(as_json=as_json, quiet=quiet) as display:
        outcome = run(spec, recipe, display)
    if as_json:
        typer.echo(json.dumps({"event": "done"} | asdict(outcome), default=str))
    elif not quiet:
        display.summary(outcome)


def _modules(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
