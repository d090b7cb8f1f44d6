"""`hetrain eval`: loss and perplexity."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cli import options


def evaluate(
    dataset: options.Dataset,
    adapter: Annotated[
        Path | None, typer.Option(help="Output of `hetrain submit`; without it, the base model.")
    ] = None,
    model_name_or_path: options.Model = "smollm2-135m",
    engine: options.Engine = options.EngineName.rlwe,
    activation_bits: options.ActivationBits = None,
    hints: options.Hints = None,
    outsource: options.Outsource = ("*",),  # type: ignore[assignment]
    max_length: options.MaxLength = 1024,
    micro_batch_tokens: options.MicroBatchTokens = 2048,
    in_flight: options.InFlight = 2,
    broker_url: options.BrokerUrl = None,
    device: options.Device = "cpu",
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Loss and perplexity of a data set, on workers that see only ciphertexts."""
    from hetrain.train.evaluation import evaluate as run
    from hetrain.train.settings import BatchSettings, FlightSettings, OutsourcingSettings

    if quiet or as_json:
        logging.getLogger().setLevel(logging.ERROR)
    settings = BatchSettings(micro_batch_tokens, max_length)
    flight = FlightSettings(in_flight)
    outsourcing = OutsourcingSettings(engine.value, activation_bits, tuple(outsource), hints)
    result = run(
        dataset, model_name_or_path, adapter, outsourcing, broker_url, device, settings, flight.in_flight
    )
    if as_json:
        typer.echo(json.dumps(asdict(result)))
    elif not quiet:
        typer.echo(
            f"loss {result.loss:.4f} · perplexity {result.perplexity:.2f} · "
            f"{result.targets} of {result.tokens} tokens supervised · {result.seconds:.1f} s"
        )
