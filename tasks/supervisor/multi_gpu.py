"""One worker process per visible GPU, or several on the CPU, under one supervisor.

Usage: ``python -m tasks.supervisor.multi_gpu [--workers N]``.

What they serve is in the environment, as for a single worker. SIGTERM or SIGINT once lets running tasks end,
twice ends everything now.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from time import sleep

from hetrain.public.errors import HetrainError, WorkerError
from hetrain.public.system import child_environment
from tasks.app import EX_CONFIG
from tasks.supervisor.worker_process import (
    KeptWorker,
    spawn_worker,
    stop,
    threads_per_worker,
)

_POLL_S = 0.1
_COUNT_GPUS = "import torch; print(torch.cuda.device_count())"

logger = logging.getLogger(__name__)


class _Requests:
    """How often this process was asked to end."""

    def __init__(self) -> None:
        self.count = 0
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._note)

    def _note(self, *_: object) -> None:
        self.count += 1


def plan_workers(workers: int | None) -> list[dict[str, str]]:
    """What each worker's environment has beside this process's.

    Args:
        workers: how many; None means one per visible GPU, and one where there is none.

    Raises:
        WorkerError: torch does not tell how many GPUs there are.
    """
    # A device that is named is everybody's.
    gpus = [] if os.environ.get("HETRAIN_DEVICE") else visible_gpus()
    count = workers or len(gpus) or 1
    threads = threads_per_worker(count)
    common = {"OMP_NUM_THREADS": str(threads)} if threads and "OMP_NUM_THREADS" not in os.environ else {}
    # With one device in sight no library can take another one by default.
    devices = [{"CUDA_VISIBLE_DEVICES": gpu, "HETRAIN_DEVICE": "cuda"} for gpu in gpus] or [{}]
    return [common | devices[index % len(devices)] for index in range(count)]


def visible_gpus() -> list[str]:
    """The names of CUDA devices in sight, as CUDA_VISIBLE_DEVICES has them. Raises `WorkerError`."""
    # In a process of its own: torch takes hundreds of megabytes, and a supervisor has no other use for it.
    command = [sys.executable, "-c", _COUNT_GPUS]
    try:
        answer = subprocess.run(
            command, stdout=subprocess.PIPE, check=True, env=child_environment(), start_new_session=True
        ).stdout
        count = int(answer)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise WorkerError(
            f"torch does not tell how many GPUs there are ({error})", hint="or set HETRAIN_DEVICE=cpu"
        ) from error
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = range(count) if named is None else named.split(",")
    return [str(name).strip() for name in names][:count]


def supervise(plans: list[dict[str, str]], requests: _Requests) -> None:
    """Keeps one worker per plan running until it is asked to end.

    A worker that cannot be started leaves the others alone. Raises `WorkerError` when none is left.
    """
    kept = [KeptWorker(_starter(index, plan), persistent=True) for index, plan in enumerate(plans)]
    running = kept
    try:
        while not requests.count:
            running = [worker for worker in running if _tended(worker)]
            if not running:
                raise WorkerError("no worker can start as it is configured", hint="see above")
            sleep(_POLL_S)
        _let_end([worker.process for worker in running if worker.process is not None], requests)
    finally:
        left = [worker.process for worker in kept if worker.process is not None]
        stop([process for process in left if process.poll() is None], first=signal.SIGQUIT)


def _starter(index: int, plan: Mapping[str, str]) -> Callable[[int], subprocess.Popen[bytes]]:
    # The supervisor's number keeps apart what several of them start on one machine.
    name = f"hetrain-{os.getpid()}-{index}"
    return lambda ready: spawn_worker(name, plan, sys.stderr, ready=ready)


def _tended(worker: KeptWorker) -> bool:
    deaths = worker.deaths
    try:
        worker.tend()
    except WorkerError as error:
        logger.error("%s", error)
        return False
    if worker.deaths != deaths:
        logger.warning("a worker died (exit status %s) and is started again", worker.status)
    return True


def _let_end(processes: list[subprocess.Popen[bytes]], requests: _Requests) -> None:
    """Has them finish what they are running, until it is asked for a second time."""
    logger.info("running tasks are finished; ask again to end now")
    for process in processes:
        process.terminate()
    while requests.count < 2 and any(process.poll() is None for process in processes):
        sleep(_POLL_S)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.supervisor.multi_gpu", description="Workers of one machine"
    )
    parser.add_argument("--workers", type=int, help="processes; default: one per visible GPU, else one")
    options = parser.parse_args()
    if options.workers is not None and options.workers < 1:
        parser.error("--workers must be positive")
    logging.basicConfig(level=logging.INFO, format="hetrain worker: %(message)s")
    requests = _Requests()
    try:
        supervise(plan_workers(options.workers), requests)
    except HetrainError as error:
        logger.error("%s", error)
        return EX_CONFIG
    return 0


if __name__ == "__main__":
    sys.exit(main())
