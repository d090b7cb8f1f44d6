"""One worker process per visible GPU, or several on the CPU, under one supervisor.

Usage: ``python -m tasks.supervisor.multi_gpu [--workers N]``.

The environment configures them as it does a single worker. The first SIGTERM or SIGINT finishes running
tasks, a second one ends everything now.
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
from hetrain.public.settings import WorkerSettings
from hetrain.public.system import child_environment
from tasks.supervisor.worker_process import SupervisedWorker, spawn_worker, stop, threads_per_worker

_POLL_S = 0.1
_COUNT_GPUS = "import torch; print(torch.cuda.device_count())"

logger = logging.getLogger(__name__)


class _StopRequests:
    """Counts the signals that ask this process to end."""

    def __init__(self) -> None:
        self.count = 0
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._increment)

    def _increment(self, *_: object) -> None:
        self.count += 1


def plan_workers(workers: int | None) -> list[dict[str, str]]:
    """The variables of each worker beside this process's own.

    Args:
        workers: how many; None means one per visible GPU, and one where there is none.

    Raises:
        WorkerError: torch cannot count the GPUs.
    """
    # All workers share a device that the settings name.
    gpus = [] if WorkerSettings().device else visible_gpus()
    count = workers or len(gpus) or 1
    threads = threads_per_worker(count)
    common = {"OMP_NUM_THREADS": str(threads)} if threads and "OMP_NUM_THREADS" not in os.environ else {}
    # A process that sees one device cannot take another one by default.
    devices = [{"CUDA_VISIBLE_DEVICES": gpu, "HETRAIN_DEVICE": "cuda"} for gpu in gpus] or [{}]
    return [common | devices[index % len(devices)] for index in range(count)]


def visible_gpus() -> list[str]:
    """The names of the visible CUDA devices, as in CUDA_VISIBLE_DEVICES. Raises `WorkerError`."""
    # In a process of its own: torch takes hundreds of megabytes, and nothing else here needs it.
    command = [sys.executable, "-c", _COUNT_GPUS]
    try:
        answer = subprocess.run(
            command, stdout=subprocess.PIPE, check=True, env=child_environment(), start_new_session=True
        ).stdout
        count = int(answer)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise WorkerError(
            f"torch cannot count the GPUs ({error})", hint="set HETRAIN_DEVICE=cpu to use no GPU"
        ) from error
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = range(count) if named is None else named.split(",")
    return [str(name).strip() for name in names][:count]


def supervise(plans: list[dict[str, str]], requests: _StopRequests) -> None:
    """Keeps one worker per plan running until a stop is requested.

    A worker that cannot be started does not affect the others. Raises `WorkerError` when none is left.
    """
    supervised = [
        SupervisedWorker(_starter(index, plan), persistent=True) for index, plan in enumerate(plans)
    ]
    running = supervised
    try:
        while not requests.count:
            running = [worker for worker in running if _keeps_running(worker)]
            if not running:
                raise WorkerError("no worker can start as it is configured", hint="see above")
            sleep(_POLL_S)
        _drain([worker.process for worker in running if worker.process is not None], requests)
    finally:
        remaining = [worker.process for worker in supervised if worker.process is not None]
        stop([process for process in remaining if process.poll() is None], first=signal.SIGQUIT)


def _starter(index: int, plan: Mapping[str, str]) -> Callable[[int], subprocess.Popen[bytes]]:
    # The supervisor's process id keeps the workers of several supervisors on one machine apart.
    name = f"hetrain-{os.getpid()}-{index}"
    return lambda ready: spawn_worker(name, plan, sys.stderr, ready=ready)


def _keeps_running(worker: SupervisedWorker) -> bool:
    deaths = worker.deaths
    try:
        worker.ensure_running()
    except WorkerError as error:
        logger.error("%s", error)
        return False
    if worker.deaths != deaths:
        logger.warning("a worker died (exit status %s) and is restarted", worker.status)
    return True


def _drain(processes: list[subprocess.Popen[bytes]], requests: _StopRequests) -> None:
    """Waits for running tasks to end, until a stop is requested a second time."""
    logger.info("finishing running tasks; a second signal ends them now")
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
    requests = _StopRequests()
    try:
        supervise(plan_workers(options.workers), requests)
    except HetrainError as error:
        logger.error("%s", error)
        return os.EX_CONFIG
    return 0


if __name__ == "__main__":
    sys.exit(main())
