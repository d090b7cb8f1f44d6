"""The `hetrain` command in processes that start in a fraction of a second.

They are forked from a process that has imported what the command needs and done nothing else.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from tempfile import TemporaryDirectory
from unittest.mock import patch

import peft  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import hetrain.inspection.doctor
import hetrain.inspection.plan_report
import hetrain.train.evaluation
import hetrain.train.finetune  # noqa: F401
from cli.main import main
from tasks.supervisor.worker_process import tie_to_parent

_TIE = tie_to_parent()  # to the server, which imports this module, too
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])


def run_forked(
    arguments: Sequence[object], timeout: float, environment: Mapping[str, str]
) -> CompletedProcess[str]:
    """Runs the command to its end in this process's working directory."""
    words = [str(argument) for argument in arguments]
    with TemporaryDirectory() as directory:
        outputs = Path(directory) / "stdout", Path(directory) / "stderr"
        for path in outputs:
            path.touch()
        process = _CONTEXT.Process(target=_command, args=(words, dict(environment), os.getcwd(), *outputs))
        # The first one starts the server. Threads of OpenBLAS would be lost in its forks.
        with patch.dict(os.environ, OPENBLAS_NUM_THREADS="1"):
            process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutExpired(words, timeout, *(path.read_text() for path in outputs))
        stdout, stderr = (path.read_text() for path in outputs)
    return CompletedProcess(words, process.exitcode, stdout, stderr)


def _command(
    words: list[str], environment: dict[str, str], directory: str, stdout: Path, stderr: Path
) -> None:
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
