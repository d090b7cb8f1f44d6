"""The `hetrain` command: its sub-commands, logging, and errors as messages and exit codes."""

from __future__ import annotations

import logging
import os
import signal
import sys

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

import hetrain
from cli.options import as_options, with_dashes
from hetrain.public.allocator import keep_freed_memory
from hetrain.public.errors import HetrainError

app = typer.Typer(
    name="hetrain",
    help="Private LoRA fine-tuning: your data stays encrypted on the machines that do the heavy part.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"token_normalize_func": with_dashes},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(hetrain.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Options of the command itself."""


def add_commands() -> None:
    """Adds the sub-commands to `app`, which imports what they need."""
    from cli.doctor import doctor
    from cli.evaluate import evaluate
    from cli.plan import plan
    from cli.prepare import prepare
    from cli.submit import submit
    from cli.worker import worker

    app.command("submit")(submit)
    app.command("eval")(evaluate)
    app.command("plan")(plan)
    app.command("prepare")(prepare)
    app.command("doctor")(doctor)
    app.command("worker")(worker)


class _OptionNames(logging.Formatter):
    """Names settings as their options."""

    def format(self, record: logging.LogRecord) -> str:
        return as_options(super().format(record))


def main() -> None:
    """Runs the command of `sys.argv`."""
    add_commands()
    stderr = Console(stderr=True)
    handler = RichHandler(console=stderr, show_time=False, show_path=False, markup=False)
    handler.setFormatter(_OptionNames("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in (
        "httpx",
        "httpx2",
        "urllib3",
        "filelock",
        "celery",
        "kombu",
        "amqp",
        "transformers",
        "huggingface_hub",
    ):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_freed_memory()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
    try:
        app()
    except HetrainError as error:
        stderr.print(error_text(error), soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        stderr.print("[bold red]error:[/] stopped")
        sys.exit(130)


def error_text(error: HetrainError) -> Text:
    """The line that says what went wrong. A `Text`: mark-up in foreign words has no effect."""
    return Text.assemble(("error:", "bold red"), " ", as_options(str(error)))
