"""run.json: the last run of a job, its process and how it ended. Written by the run itself."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, ParamSpec

from pydantic import BaseModel, ConfigDict, Field

from hetrain.config import JobSpec
from hetrain.jobs import registry
from hetrain.jobs.files import LOG_FILE, RUN_FILE
from hetrain.jobs.process import ProcessIdentity, this_process
from hetrain.jobs.settings import to_json, without_place
from hetrain.public.disk import reason_of, replace_text
from hetrain.public.errors import HetrainError, Interrupted, UsageError

_log = logging.getLogger(__name__)

P = ParamSpec("P")
Phase = Literal["preparing", "running", "stopping"]


class Run(BaseModel):
    """The last run of a job.

    Attributes:
        format: version of this layout.
        id: the job's name, which it keeps when it is resumed.
        phase: what the run does, or did when it ended.
        process: in which process.
        begun: when.
        is_resumed: whether it goes on from a checkpoint.
        uses_broker: whether its workers are those of a given broker, whose address is not kept.
        settings: the job's, see `hetrain.jobs.settings`.
        ended: when; None while it runs, and if it was killed.
        exit_code: see docs/reference/exit-codes.md.
        error: what went wrong.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    format: Literal[1] = 1
    id: str = Field(pattern=r"^[0-9a-f]{8}$")
    phase: Phase
    process: ProcessIdentity
    begun: datetime
    is_resumed: bool
    uses_broker: bool
    settings: dict[str, Any]
    ended: datetime | None = None
    exit_code: int | None = None
    error: str = ""


def read_run(output_dir: Path) -> Run | None:
    """The run in an output directory; None if there is none.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return Run.model_validate_json((output_dir / RUN_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the run's record cannot be read: {str(error).splitlines()[0]}",
            where=str(output_dir / RUN_FILE),
            hint="it may be of another version of hetrain",
        ) from error


class RunRecorder:
    """Keeps run.json true while a run goes on. That it cannot be written is a warning.

    Args:
        spec: the job.
        is_resumed: whether it goes on from a checkpoint in its output directory, and so is the same job.
        on_start: called with the job's id when it starts for real.
    """

    def __init__(
        self, spec: JobSpec, *, is_resumed: bool, on_start: Callable[[str], object] = lambda job_id: None
    ) -> None:
        self._on_start = on_start
        settings = without_place(spec)
        self._directory = settings.output_dir
        self._run = Run(
            id=self._former_id() if is_resumed else _new_id(),
            phase="preparing",
            process=this_process(),
            begun=_now(),
            is_resumed=is_resumed,
            uses_broker=spec.workers is not None,
            settings=to_json(settings),
        )
        if not is_resumed:
            with suppress(OSError):
                (self._directory / LOG_FILE).unlink()  # another job's
        self._write()
        registry.register(self._run.id, self._directory)

    def starts(self) -> None:
        """Workers have agreed to compute the job. Does nothing the second time."""
        if self._run.phase == "preparing":
            self._enter("running")
            self._on_start(self._run.id)

    def before(self, then: Callable[P, object]) -> Callable[P, None]:
        """A function that says that the job starts and then calls `then`."""

        def call(*arguments: P.args, **named: P.kwargs) -> None:
            self.starts()
            then(*arguments, **named)

        return call

    def stops(self, then: Callable[[], object]) -> None:
        """A signal has asked the run to stop: records it and calls `then`."""
        self._enter("stopping")
        then()

    def end(self, exit_code: int, error: str = "") -> None:
        """The run has ended."""
        end = {"ended": _now(), "exit_code": exit_code, "error": error}
        self._run = self._run.model_copy(update=end)
        self._write()

    def _enter(self, phase: Phase) -> None:
        self._run = self._run.model_copy(update={"phase": phase})
        self._write()

    def _former_id(self) -> str:
        with suppress(UsageError):
            if former := read_run(self._directory):
                return former.id
        return _new_id()

    def _write(self) -> None:
        try:
            replace_text(self._directory / RUN_FILE, self._run.model_dump_json(indent=2) + "\n")
        except OSError as error:
            _log.warning("%s cannot be written: %s", RUN_FILE, reason_of(error))


@contextmanager
def recorded_run(
    spec: JobSpec, *, is_resumed: bool, on_start: Callable[[str], object] = lambda job_id: None
) -> Iterator[RunRecorder]:
    """Records the run of a job, which owns its output directory, while the block lasts, and how that ends.

    Arguments as of `RunRecorder`.
    """
    recorder = RunRecorder(spec, is_resumed=is_resumed, on_start=on_start)
    try:
        yield recorder
    except Interrupted as error:
        recorder.end(error.exit_code, error.what)
        raise
    except HetrainError as error:
        recorder.end(error.exit_code, str(error))
        raise
    except KeyboardInterrupt:
        recorder.end(Interrupted.exit_code, "stopped before the first update")
        raise
    except BaseException as error:
        recorder.end(HetrainError.exit_code, f"{type(error).__name__}: {error}")
        raise
    recorder.end(0)


def _new_id() -> str:
    return secrets.token_hex(4)


def _now() -> datetime:
    return datetime.now(UTC)
