"""Options that several commands share, declared once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError


class EngineName(StrEnum):
    """Engines that can be named on the command line."""

    rlwe = "rlwe"
    concrete = "concrete"
    clear = "clear"


def _size(text: str) -> int:
    """Bytes, from a number with or without a unit."""
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise typer.BadParameter(f"{text!r} is no size: write a number of bytes, 500MB or 2GiB") from None


Dataset = Annotated[
    Path, typer.Argument(help="JSONL rows: text, prompt+completion, or messages.", show_default=False)
]
Model = Annotated[
    str,
    typer.Option("--model-name-or-path", "-m", help="smollm2-135m, a Hugging Face directory, or a hub id."),
]
Engine = Annotated[
    EngineName,
    typer.Option(
        "--engine", help="rlwe encrypts; concrete too, exactly but slowly; clear hides nothing (for tests)."
    ),
]
ActivationBits = Annotated[
    int | None,
    typer.Option(
        "--activation-bits",
        help="Most bits of an encrypted value; without it, as many as the engine has room for.",
        show_default=False,
    ),
]
Outsource = Annotated[
    list[str],
    typer.Option(
        "--outsource",
        metavar="PATTERN",
        help="Glob on full module names, as in 'model.layers.*.mlp.*', repeatable: only matching linears of "
        "the decoder blocks go to workers, the others run on the client.",
    ),
]
Hints = Annotated[
    bool | None,
    typer.Option(
        "--hints/--no-hints",
        help="Keep products with masks on disk, so that workers compute them once; default: if it pays.",
        show_default=False,
    ),
]
BrokerUrl = Annotated[
    str | None,
    typer.Option(
        "--broker-url",
        envvar="HETRAIN_BROKER_URL",
        help="Redis or Valkey where workers listen. Without it, broker and worker run here, for this job.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option("--device", help="torch device of the client's own layers.")]
MaxLength = Annotated[int, typer.Option("--max-length", help="Longest row in tokens; longer ones are cut.")]
MicroBatchTokens = Annotated[
    int, typer.Option("--micro-batch-tokens", help="Tokens per micro-batch; 2048 fill the largest ring.")
]
InFlight = Annotated[int, typer.Option("--in-flight", help="Micro-batches under way at once.")]
MaxBytesInFlight = Annotated[
    int | None,
    typer.Option(
        "--max-bytes-in-flight",
        parser=_size,
        metavar="SIZE",
        help="The most that operands and results may take in the broker at once, e.g. 500MB or 2GiB; without "
        "it, half of the broker's maxmemory, or 1 GiB where it has none.",
        show_default=False,
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON lines on standard output instead of a display.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
