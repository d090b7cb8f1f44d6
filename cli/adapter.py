"""`hetrain ask`, `merge`, `export` and `report`: what one does with an adapter. In clear, on this machine."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import log_errors_only
from cli.options import AsJson, Quiet, option
from hetrain import api
from hetrain.config import RunSpec
from hetrain.public.errors import UsageError

if TYPE_CHECKING:
    from hetrain.api import Export

_Adapter = Annotated[
    Path, typer.Argument(help="Output directory of a job, one of its checkpoints, or a PEFT LoRA adapter.")
]
_Model = Annotated[
    str | None,
    typer.Option(
        "--model-name-or-path",
        "-m",
        help="The base model: smollm2-135m, a Hugging Face directory, or a hub id.",
        show_default="the adapter's",
    ),
]
_Device = Annotated[str, option(RunSpec, "device")]
_Check = Annotated[
    Path | None,
    typer.Option(
        help="Held-out rows on which the export must have the adapter's loss.",
        show_default="those that the adapter was evaluated on last",
    ),
]


def ask(
    adapter: _Adapter,
    question: Annotated[
        str, typer.Argument(help="The question; - reads one from each line of standard input.")
    ],
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of draws at a temperature.")] = 0,
    prompt_template: Annotated[
        str | None,
        typer.Option(
            help="A text with {} in the place of the question.",
            show_default="as the training rows word their prompts",
        ),
    ] = None,
    base_only: Annotated[
        bool, typer.Option("--base-only", help="Ask the base model without the adapter.")
    ] = False,
    model: _Model = None,
    device: _Device = "cpu",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Ask an adapter questions: in clear, on this machine, without workers."""
    _be_quiet(quiet or as_json)
    questions = [line.strip() for line in sys.stdin if line.strip()] if question == "-" else [question]
    if not questions:
        raise UsageError("standard input has no question", hint="give one on each line")
    answers = api.ask(
        adapter,
        questions,
        model=model,
        prompt_template=prompt_template,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        base_only=base_only,
        device=device,
    )
    for asked, answer in zip(questions, answers, strict=True):
        if as_json:
            typer.echo(json.dumps({"question": asked, "answer": answer}))
        elif len(questions) == 1:
            typer.echo(answer)
        else:
            typer.echo(f"{asked}\n    {answer}")


def merge(
    adapter: _Adapter,
    output: Annotated[Path, typer.Argument(help="The model's directory, new or empty.")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    check: _Check = None,
    model: _Model = None,
    device: _Device = "cpu",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Merge an adapter into its base model: a Hugging Face directory, checked before it gets its name."""
    _be_quiet(quiet or as_json)
    _show(api.merge(adapter, output, dtype=dtype, check=check, model=model, device=device), as_json, quiet)


def export(
    adapter: _Adapter,
    output: Annotated[Path, typer.Argument(help="The GGUF file, which must not exist yet.")],
    check: _Check = None,
    model: _Model = None,
    device: _Device = "cpu",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write an adapter as llama.cpp reads it: a GGUF file for its --lora, checked before it is kept."""
    _be_quiet(quiet or as_json)
    _show(api.export_gguf(adapter, output, check=check, model=model, device=device), as_json, quiet)


def report(
    output_dir: Annotated[Path, typer.Argument(help="Output directory of a job.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page's file.", show_default="report.html in the directory"),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page on a run: loss, staleness, time, bytes, workers, noise, verification, settings."""
    path = api.report(output_dir, output)
    if not quiet:
        typer.echo(str(path))


def _be_quiet(wanted: bool) -> None:
    if wanted:
        log_errors_only()


def _show(result: Export, as_json: bool, quiet: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(result), default=str))
    elif not quiet:
        typer.echo(str(result))
