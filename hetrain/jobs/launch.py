"""Starting a job in a session of its own, which survives the terminal and the process that starts it."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from hetrain.config import JobSpec
from hetrain.jobs.files import LOG_FILE
from hetrain.jobs.settings import from_json, to_json
from hetrain.public.disk import reason_of, where_there_is_room
from hetrain.public.errors import JobDied, StorageError
from hetrain.public.system import child_environment, discard_stream

if TYPE_CHECKING:
    from typing_extensions import Buffer

# To rich: what it writes to is no terminal, or soon will be none.
_PLAIN_OUTPUT = {"TTY_COMPATIBLE": "0", "TTY_INTERACTIVE": "0"}


@dataclass(frozen=True)
class Launch:
    """The id of a job that has started, or the exit code of the process that could not start it."""

    job_id: str
    exit_code: int = 0


def launch(spec: JobSpec, command: Sequence[str]) -> Launch:
    """Runs `command` in a session of its own, and returns when it calls `Launcher.started`, or has ended.

    Until then it has this process's standard error. The settings, and with them the broker's address, reach
    it through a socket: other users of the machine can read arguments.

    Raises:
        JobDied: the process was killed before that.

    Args:
        spec: the job.
        command: gets one more argument, for `Launcher`.
    """
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                stdin=None if "-" in spec.dataset else subprocess.DEVNULL,
                env=child_environment() | _PLAIN_OUTPUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        try:
            with suppress(OSError):  # it has ended already
                ours.sendall(json.dumps(to_json(spec)).encode())
                ours.shutdown(socket.SHUT_WR)
            job_id = ours.makefile().readline().strip()
            return Launch(job_id) if job_id else Launch("", _exit_code(process.wait()))
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise


class Launcher:
    """The way back to the process that has launched this one.

    Args:
        descriptor: the last argument of the command.
    """

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        with self._socket.makefile() as stream:
            self.spec = from_json(json.load(stream))

    def started(self, job_id: str) -> None:
        """Sends this process's output to the log in the job's directory from now on, and says so.

        Raises:
            StorageError: the log cannot be made.
        """
        _write_to(self.spec.output_dir / LOG_FILE)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        print(f"{now}: job {job_id} runs in process {os.getpid()}", flush=True)  # noqa: T201
        with self._socket, suppress(OSError):  # that process has been killed: the job goes on
            self._socket.sendall(f"{job_id}\n".encode())


def _exit_code(code: int) -> int:
    if code < 0:
        raise JobDied(
            f"the job's process was ended by signal {-code} before it had started",
            hint="the log of the system may say why, such as a lack of memory",
        )
    return code


def _write_to(log: Path) -> None:
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise StorageError(
            f"the log cannot be written: {reason_of(error)}", where=str(log), hint="make room on this disk"
        ) from error
    discard_stream(0)
    for stream in 1, 2:
        os.dup2(descriptor, stream)
    sys.stdout = sys.stderr = io.TextIOWrapper(_Log(descriptor, "wb"), "utf-8", "replace", write_through=True)


class _Log(io.FileIO):
    """A file that loses what there is no room for: a full disk pauses a run, and its log must not end it."""

    def write(self, data: Buffer, /) -> int:
        with where_there_is_room():
            return super().write(data)
        return memoryview(data).nbytes
