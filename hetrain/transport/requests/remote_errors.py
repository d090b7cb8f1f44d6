"""Workers' failures as exceptions of ours."""

from __future__ import annotations

from hetrain.public import errors
from hetrain.public.errors import HetrainError, TaskFailed
from hetrain.public.protocol.messages import Failure

_UNTRUSTED = {"HetrainError", "Interrupted"}


def error_of(failure: Failure) -> HetrainError:
    """The exception that `failure` describes; `TaskFailed` when it names none that a worker may raise."""
    found = getattr(errors, failure.error, None)
    if not (isinstance(found, type) and issubclass(found, HetrainError)) or failure.error in _UNTRUSTED:
        found = TaskFailed
    return found(_plain(failure.what), where=_plain(failure.where), hint=_plain(failure.hint))


def _plain(text: str) -> str:
    """`text` without control characters: it comes from a worker and may end on a terminal."""
    return "".join(char if char.isprintable() else " " for char in text)
