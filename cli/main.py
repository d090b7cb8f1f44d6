"""The `hetrain` command: its sub-commands, logging, and errors as messages and exit codes."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import traceback
from functools import cache
from types import FrameType
from typing import Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

import hetrain
from cli.console import debug_wanted, set_debug, stderr_console
from cli.options import as_options, with_dashes
from hetrain.public.allocator import keep_freed_memory
from hetrain.public.disk import is_full, reason_of
from hetrain.public.errors import HetrainError, StorageError
from hetrain.public.system import discard_stream, leave_dead_terminal

app = typer.Typer(
    name="hetrain",
    help="Private LoRA fine-tuning: your data stays encrypted on the machines that do the heavy part.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
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
    debug: bool = typer.Option(
        False, "--debug", callback=set_debug, is_eager=True, help="Print the traceback of an error, too."
    ),
) -> None:
    """Options of the command itself."""


@cache
def add_commands() -> dict[str, Any]:
    """Adds the sub-commands to `app`, once, which imports what they need. Returns them by name."""
    from cli.adapter import ask, export, merge, report
    from cli.cache import cache as show_cache
    from cli.doctor import doctor
    from cli.evaluate import evaluate
    from cli.jobs import cancel, list_jobs, logs, resume, status, wait
    from cli.plan import plan
    from cli.prepare import prepare
    from cli.submit import run_detached, submit
    from cli.worker import worker

    app.command("submit")(submit)
    app.command("list")(list_jobs)
    app.command("status")(status)
    app.command("logs")(logs)
    app.command("wait")(wait)
    app.command("cancel")(cancel)
    app.command("resume")(resume)
    app.command("run-detached", hidden=True)(run_detached)
    app.command("eval")(evaluate)
    app.command("ask")(ask)
    app.command("merge")(merge)
    app.command("export")(export)
    app.command("report")(report)
    app.command("plan")(plan)
    app.command("prepare")(prepare)
    app.command("doctor")(doctor)
    app.command("worker")(worker)
    app.command("cache")(show_cache)
    return typer.main.get_command(app).commands  # type: ignore[attr-defined,no-any-return]


class _OptionNames(logging.Formatter):
    """Names settings as their options."""

    def format(self, record: logging.LogRecord) -> str:
        return as_options(super().format(record))


def main() -> None:
    """Runs the command of `sys.argv`."""
    add_commands()
    stderr = stderr_console()
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
        "gguf",
        "huggingface_hub",
    ):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_freed_memory()
    _warn_of_passwords(sys.argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not under nohup
        signal.signal(signal.SIGHUP, _end_without_terminal)
    try:
        app()
    except HetrainError as error:
        sys.exit(_report(stderr, error))
    except KeyboardInterrupt:
        stderr.print("[bold red]error:[/] stopped")
        sys.exit(130)
    except Exception as error:
        if debug_wanted():
            raise
        sys.exit(_report(stderr, _unforeseen(error)))


def _warn_of_passwords(arguments: list[str]) -> None:
    if any(re.search(r"\w://[^/@]*:[^/@]+@", word) for word in arguments):
        logging.getLogger("hetrain").warning(
            "the broker's password stands in the command line, which every user of this machine can read: "
            "set HETRAIN_BROKER_URL, or HETRAIN_BROKER_PASSWORD_FILE"
        )


def _report(stderr: Console, error: HetrainError) -> int:
    """Prints an error. Returns its exit code, which says what happened even where nothing can be printed."""
    try:
        if debug_wanted():
            traceback.print_exception(error)
        stderr.print(error_text(error), soft_wrap=True)
    except OSError:  # it is a file on a full disk, or nobody reads it
        discard_stream(sys.stderr.fileno())
    return error.exit_code


def _unforeseen(error: Exception) -> HetrainError:
    """An error that nobody has mapped, in one line."""
    if isinstance(error, OSError) and is_full(error):
        where = str(error.filename or "")
        return StorageError(reason_of(error), where=where, hint="make room on this disk")
    line = next(iter(str(error).splitlines()), "")
    return HetrainError(
        f"{type(error).__name__}: {line}", hint="`hetrain --debug ...` shows where; please report it"
    )


def _end_without_terminal(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that closes sends it more than once
    leave_dead_terminal()
    raise KeyboardInterrupt


def error_text(error: HetrainError) -> Text:
    """The line that says what went wrong. A `Text`: mark-up in foreign words has no effect."""
    return Text.assemble(("error:", "bold red"), " ", as_options(str(error)))
