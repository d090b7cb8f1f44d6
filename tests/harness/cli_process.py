"""The `hetrain` command in processes that start in a fraction of a second.

They are forked from a process that has imported what the command needs and done nothing else.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from tempfile import TemporaryDirectory
from unittest.mock import patch

import celery.app.amqp
import celery.canvas
import celery.events.receiver  # noqa: F401
import peft  # noqa: F401
import rich.progress  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import cli.submit  # noqa: F401
import hetrain.inspection.doctor
import hetrain.inspection.plan_report
import hetrain.train.evaluation
import hetrain.train.finetune  # noqa: F401
from cli.main import main
from tasks.supervisor.worker_process import tie_to_parent

get_checkpoint_conversion_mapping("llama")  # makes those of all families, once
_TIE = tie_to_parent()  # to the server, which imports this module, too
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])


class ForkedCommand:
    """The command, running in a session of its own.

    Attributes:
        pid: its process id.
        outputs: the files of its standard output and its errors.
    """

    def __init__(
        self, arguments: Sequence[object], environment: Mapping[str, str], directory: Path, cwd: str
    ) -> None:
        words = [str(argument) for argument in arguments]
        self.outputs = directory / "stdout", directory / "stderr"
        for path in self.outputs:
            path.touch()
        self._process = _CONTEXT.Process(target=_command, args=(words, dict(environment), cwd, *self.outputs))
        # The first one starts the server. Threads of OpenBLAS would be lost in its forks.
        with patch.dict(os.environ, OPENBLAS_NUM_THREADS="1"):
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def wait(self, timeout: float) -> int | None:
        """Its exit status; None if it still runs after so many seconds."""
        self._process.join(timeout)
        return self._process.exitcode

    def kill(self) -> None:
        """Kills it, and waits until it has ended."""
        self._process.kill()
        self._process.join()

    def texts(self) -> tuple[str, str]:
        """What it has written so far: standard output, errors."""
        stdout, stderr = (path.read_text(errors="replace") for path in self.outputs)
        return stdout, stderr


def run_forked(
    arguments: Sequence[object], timeout: float, environment: Mapping[str, str]
) -> CompletedProcess[str]:
    """Runs the command to its end in this process's working directory."""
    with TemporaryDirectory() as directory:
        command = ForkedCommand(arguments, environment, Path(directory), os.getcwd())
        status = command.wait(timeout)
        words = [str(argument) for argument in arguments]
        if status is None:
            command.kill()
            raise TimeoutExpired(words, timeout, *command.texts())
        return CompletedProcess(words, status, *command.texts())


def _command(
    words: list[str], environment: dict[str, str], directory: str, stdout: Path, stderr: Path
) -> None:
    gc.freeze()  # else every collection looks at all that was imported
    os.setsid()
    if _TIE:
        _TIE()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    for number, path in (0, Path(os.devnull)), (1, stdout), (2, stderr):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.argv = ["hetrain", *words]
    main()
