"""Workers' failures as exceptions of ours, whose text is quoted: whoever wrote it is not trusted."""

from __future__ import annotations

import re

from hetrain.public.errors import BlobMissing, HetrainError, TaskFailed, WorkerRefused
from hetrain.public.protocol.messages import Failure

_CLASSES: dict[str, type[HetrainError]] = {"BlobMissing": BlobMissing, "WorkerRefused": WorkerRefused}
_LONGEST = 600


def error_of(failure: Failure, worker: str) -> HetrainError:
    """The exception that `failure` of `worker` describes.

    Its class is one that a request recovers from in a way of its own, `BlobMissing` or `WorkerRefused`, else
    `TaskFailed`. The text is one quotation, the worker's advice included; the hint is the client's.
    """
    place = f"{failure.where}: " if failure.where else ""
    advice = f". {failure.hint}" if failure.hint else ""
    return _CLASSES.get(failure.error, TaskFailed)(
        f"worker {worker} reports: {_quoted(place + failure.what + advice)}",
        hint="see the log of that worker, or start others",
    )


def _quoted(text: str) -> str:
    """`text` between quotes, as one line, without control characters, quotes and backticks of its own."""
    plain = "".join(char if char.isprintable() else " " for char in text)
    plain = " ".join(re.sub('["`\u201c\u201d]', "'", plain).split())
    return f'"{plain}"' if len(plain) <= _LONGEST else f'"{plain[:_LONGEST]}…"'
