"""The exception tree. Every error a user can meet says what happened, where, and what to do next.

    HetrainError                     exit code 1
    ├── UsageError                   2   a setting makes no sense
    ├── DatasetError                 3   a row of the data set cannot be used
    ├── ModelError                   4   a checkpoint cannot be found or read
    │   ├── ModelUnreachable             the hub does not answer, which may pass
    │   └── UnsupportedArchitecture      a model that cannot be split between client and workers
    ├── ParameterError               5   an encryption parameter set is weak or inconsistent
    ├── WireError                    6   a message or a blob is malformed
    ├── BrokerError                  7   the message broker failed
    │   ├── BrokerUnreachable            nobody answers, or the credentials are wrong
    │   ├── BrokerFull                   the broker is out of memory
    │   └── BlobMissing                  a blob has expired or was removed
    ├── WorkerError                  8   the workers failed
    │   ├── NoWorker                     nobody serves the queue
    │   ├── WorkerRefused                a worker will not serve this job: other weights, unknown model
    │   ├── TaskFailed                   a task failed on the worker
    │   └── ResultRejected               a worker's result failed a check; ``where`` names the worker
    ├── NotFinite                    9   training has produced a NaN or an infinity
    ├── StorageError                 10  a disk is full, or a file cannot be written
    ├── JobDied                      11  a job's process has ended without a word
    └── Interrupted                  130 the user asked to stop

Foreign exceptions are mapped to these once, at the edge where they arise (``raise ... from error``).
"""

from __future__ import annotations

from typing import ClassVar

_LONGEST_PART = 4000


class HetrainError(Exception):
    """Root of all errors that hetrain raises on purpose.

    All parts are made fit for a terminal: strangers' files and messages give names and reasons in them.

    Args:
        what: what happened, as one sentence without a full stop.
        where: file and line, module, key or address; empty when there is none.
        hint: what to do next, as one sentence without a full stop.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        self.what, self.hint = _shown(what), _shown(hint)
        self.where = _shown(where).replace("\n", " ")
        super().__init__(self.what)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f". {self.hint}" if self.hint else ""
        return f"{place}{self.what}{advice}"


def _shown(text: str) -> str:
    """`text` without control characters but line ends, cut to 4000 characters."""
    if len(text) > _LONGEST_PART:
        text = f"{text[: _LONGEST_PART - 1]}…"
    return text if text.isprintable() else "".join(map(_shown_character, text))


def _shown_character(char: str) -> str:
    if char.isprintable() or char == "\n":
        return char
    return " " if char.isspace() else "?"


class UsageError(HetrainError):
    """A setting makes no sense: `field` is its name in `hetrain.config`, empty if none is to blame alone.

    Texts of all errors name settings in backticks; the command line replaces them by its options.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", hint: str = "", field: str = "") -> None:
        super().__init__(what, where=where or (f"`{field}`" if field else ""), hint=hint)
        self.field = field


class DatasetError(HetrainError):
    """A row of the data set cannot be used."""

    exit_code = 3


class ModelError(HetrainError):
    """A checkpoint cannot be found or read."""

    exit_code = 4


class ModelUnreachable(ModelError):
    """The hub does not answer, or not now: the same call may succeed later."""


class UnsupportedArchitecture(ModelError):
    """The model cannot be split between client and workers; ``where`` names the module."""


class ParameterError(HetrainError):
    """An encryption parameter set is weak or inconsistent, or a value lies outside its range."""

    exit_code = 5


class WireError(HetrainError):
    """A message or a blob is malformed."""

    exit_code = 6


class BrokerError(HetrainError):
    """The message broker failed."""

    exit_code = 7


class BrokerUnreachable(BrokerError):
    """Nobody answers at the broker's address, or the credentials are wrong."""


class BrokerFull(BrokerError):
    """The broker is out of memory and stayed so while we backed off."""


class BlobMissing(BrokerError):
    """A blob has expired or was removed."""


class WorkerError(HetrainError):
    """The workers failed."""

    exit_code = 8


class NoWorker(WorkerError):
    """Nobody serves the queue, or nobody answered in time."""


class WorkerRefused(WorkerError):
    """A worker will not serve this job: other weights, an unknown model, a missing engine."""


class TaskFailed(WorkerError):
    """A task failed on the worker."""


class ResultRejected(WorkerError):
    """Results failed verification; `workers` are those that computed them."""

    def __init__(self, what: str, *, where: str = "", hint: str = "", workers: tuple[str, ...] = ()) -> None:
        super().__init__(what, where=where, hint=hint)
        self.workers = workers


class NotFinite(HetrainError):
    """Training has produced a NaN or an infinity."""

    exit_code = 9


class StorageError(HetrainError):
    """A disk is full, or a file cannot be written."""

    exit_code = 10


class JobDied(HetrainError):
    """A job's process has ended without a word: it was killed, or its machine was switched off."""

    exit_code = 11


class Interrupted(HetrainError):
    """The user asked to stop."""

    exit_code = 130
