"""Celery workers as they are, but for a delay where they would multiply: ``python -m benchmarks.delayed``.

They take tasks, load operands, store results and report as any worker does. What is modelled
(`benchmarks.hardware.WorkerModel`) is the time that a GPU would take, and a network slower than this
machine's memory: a blob is not there before the modelled network could have brought it. Every time is
multiplied by `Pace.dilation`, and of every matrix one row in `Pace.share` travels, since the client and the
broker beside these workers are small ones.

A process with all modules imported forks the workers, so that sixteen start in seconds. It reads lines
``{"workers": count, "pace": {...}}`` from standard input, answers each with ``{"pids": [...]}`` once that
many take tasks, and ends with its input. The broker is that of HETRAIN_BROKER_URL.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from time import monotonic, perf_counter, sleep
from typing import IO, Any, cast

from benchmarks.hardware import ProductModel, WorkerModel
from hetrain.public.broker.blobs import BlobStore, Buffer
from hetrain.public.errors import WireError, WorkerError
from hetrain.public.lattice.header import RlweHeader
from hetrain.public.protocol.messages import QUEUE, Blob, EvaluateTask, PrepareTask
from hetrain.public.protocol.plan import Plan, parse_plan
from hetrain.public.protocol.product import Product

_MODULES = ("celery.bin.celery", "celery.apps.worker", "celery.concurrency.thread", "worker_gpu.service")
_OPTIONS = ("-Q", QUEUE, "-E", "-l", "WARNING")
_START_S, _STOP_S = 60.0, 10.0


@dataclass(frozen=True)
class Pace:
    """The speed of a delayed worker, and the share of each matrix that travels.

    Attributes:
        worker: what it stands for.
        dilation: its times are multiplied by this; 0 for none at all.
        share: of every matrix one row in so many travels.
    """

    worker: WorkerModel = field(default_factory=WorkerModel)
    dilation: float = 1.0
    share: int = 1

    def network_s(self, nbytes: int) -> float:
        """For a blob of `nbytes` here, which stands for `share` times as many."""
        return self.dilation * nbytes * self.share / self.worker.network_bytes_per_s

    def gpu_s(self, product: ProductModel) -> float:
        """For the whole product."""
        return self.dilation * self.worker.gpu_s(product)

    def seconds(self, product: ProductModel) -> float:
        """For the whole product, network included: no worker does it in less."""
        return self.dilation * self.worker.seconds(product)

    def scaled(self, product: ProductModel) -> ProductModel:
        """The part of a product that really travels."""
        if product.k % self.share or product.n % self.share:
            raise ValueError(f"{product.k} × {product.n} rows cannot be shared by {self.share}")
        return replace(product, k=product.k // self.share, n=product.n // self.share)


class DelayedService:
    """In place of `worker_gpu.service.Service`: gives results of the right size after the right time."""

    def __init__(self, pace: Pace) -> None:
        self.description = f"delay model, times {pace.dilation:.3g}"
        self._pace = pace
        self._zeros = memoryview(b"")
        self._plans: dict[str, Plan] = {}

    def describe(self, engine: str) -> str:
        """The same for all engines."""
        return self.description

    def prepare(self, task: PrepareTask, load_plan: Callable[[], bytes]) -> None:
        """Reads the plan; there is nothing to load."""
        self._plan(task, load_plan)

    def check(self, task: EvaluateTask, load_plan: Callable[[], bytes]) -> None:
        """Compares the announced size of an operand with the product's."""
        expected = self._pace.scaled(product_of(task, self._plan(task, load_plan))).bytes_up
        if task.input.nbytes != expected:
            raise WireError(f"the operand has {task.input.nbytes} bytes, not {expected}")

    def evaluate(
        self, task: EvaluateTask, load_plan: Callable[[], bytes], payload: memoryview
    ) -> list[memoryview]:
        """Zeros, as many as rows ``start:stop`` of the product bring, at the time at which they would."""
        begin = perf_counter()
        product = product_of(task, self._plan(task, load_plan))
        scaled = self._pace.scaled(product)
        if payload.nbytes != scaled.bytes_up:
            raise WireError(f"the operand has {payload.nbytes} bytes, not {scaled.bytes_up}")
        _sleep_until(begin + self._pace.gpu_s(product))
        if self._zeros.nbytes < scaled.bytes_down:
            self._zeros = memoryview(bytes(scaled.bytes_down))
        return [self._zeros[: scaled.bytes_down]]

    def _plan(self, task: PrepareTask | EvaluateTask, load_plan: Callable[[], bytes]) -> Plan:
        if task.plan_digest not in self._plans:
            self._plans[task.plan_digest] = parse_plan(load_plan(), task.plan_digest)
        return self._plans[task.plan_digest]


def product_of(task: EvaluateTask, plan: Plan) -> ProductModel:
    """The product that `task` asks for: rows ``start:stop`` alone."""
    group = next(group for group in plan.groups if group.name == task.group)
    header = RlweHeader.from_wire(task.header, where=task.group)
    tokens = header.result_format.parameters.ring_degree
    k = Product(group, task.direction).k
    return ProductModel(task.group, task.direction, k, task.stop - task.start, tokens)


class PacedStore(BlobStore):
    """Operands and results take as long as the modelled network needs for them, or longer."""

    pace = Pace()

    def get(self, blob: Blob, **limits: Any) -> memoryview:
        begin = perf_counter()
        data = super().get(blob, **limits)
        if blob.kind == "in":
            _sleep_until(begin + self.pace.network_s(blob.nbytes))
        return data

    def put(self, job: str, kind: Any, token: str, parts: Sequence[Buffer], **limits: Any) -> Blob:
        # First, since the report of a result's end travels behind its bytes.
        sleep(self.pace.network_s(sum(memoryview(part).nbytes for part in parts)))
        return super().put(job, kind, token, parts, **limits)


def _sleep_until(moment: float) -> None:
    if (rest := moment - perf_counter()) > 0:
        sleep(rest)


class Fleet:
    """The other end of `main`: delayed workers on a broker, as many as are asked for."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def resize(self, workers: int, pace: Pace) -> list[int]:
        """Has so many workers of this pace take tasks, and gives their process ids. Raises `WorkerError`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"workers": workers, "pace": asdict(pace)}) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise WorkerError("the delayed workers do not start", hint="see what they wrote")
        pids: list[int] = json.loads(answer)["pids"]
        return pids


@contextmanager
def fleet(url: str, model: str, log: IO[bytes]) -> Iterator[Fleet]:
    """A fleet without workers yet, on the broker at `url`; they go when the context ends."""
    environment = os.environ | {"HETRAIN_BROKER_URL": url, "HETRAIN_MODELS": json.dumps([model])}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.delayed"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    try:
        yield Fleet(process)
    finally:
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()


class _WorkerPool:
    """The forked workers."""

    def __init__(self) -> None:
        self._pids: list[int] = []
        self._pace = Pace()
        self._started = 0

    def resize(self, count: int, pace: Pace) -> list[int]:
        if pace != self._pace:
            self.stop(0)
        self._pace = pace
        self.stop(count)
        ready, theirs = os.pipe()
        missing = count - len(self._pids)
        for _ in range(missing):
            self._started += 1
            self._pids.append(_fork(self._started, pace, theirs))
        os.close(theirs)
        _await(ready, missing)
        os.close(ready)
        return list(self._pids)

    def stop(self, count: int) -> None:
        """Leaves the oldest `count`."""
        leaving, self._pids = self._pids[count:], self._pids[:count]
        for pid in leaving:
            os.kill(pid, signal.SIGTERM)
        end = monotonic() + _STOP_S
        while leaving and monotonic() < end:
            leaving = [pid for pid in leaving if os.waitpid(pid, os.WNOHANG)[0] == 0]
            sleep(0.05)
        for pid in leaving:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _fork(index: int, pace: Pace, ready: int) -> int:
    from tasks.supervisor.worker_process import tie_to_parent

    tie = tie_to_parent()
    if pid := os.fork():
        return pid
    try:
        os.setsid()
        if tie is not None:
            tie()
        os.dup2(2, 1)  # standard output is for answers
        _work(index, pace, ready)
    except BaseException:  # noqa: BLE001 - whatever it is, this copy must not go on as its parent
        traceback.print_exc()
    os._exit(1)


def _work(index: int, pace: Pace, ready: int) -> None:
    from celery import signals

    import tasks.run
    import worker_gpu.service
    import worker_gpu.weights.store
    from tasks.app import app

    PacedStore.pace = pace
    service = DelayedService(pace)
    # All are looked up later. Without a model these workers take from the common queue alone.
    cast(Any, worker_gpu.service).service = lambda: service
    cast(Any, worker_gpu.weights.store).available_models = dict
    cast(Any, tasks.run).BlobStore = PacedStore
    signals.worker_ready.connect(lambda **_: os.write(ready, b"r"), weak=False)
    app.start(["worker", *_OPTIONS, "-n", f"delayed-{index}@%h"])


def _await(ready: int, count: int) -> None:
    end = monotonic() + _START_S
    while count:
        if not select.select([ready], [], [], max(0.0, end - monotonic()))[0]:
            raise SystemExit(f"{count} delayed workers are not ready after {_START_S:.0f} s")
        got = len(os.read(ready, count))
        if not got:
            raise SystemExit("a delayed worker has died")
        count -= got


def _parse(line: str) -> tuple[int, Pace]:
    request = json.loads(line)
    pace = request["pace"]
    return request["workers"], Pace(**(pace | {"worker": WorkerModel(**pace["worker"])}))


def main() -> None:
    """Serves requests until standard input ends."""
    from tasks.app import app

    app.loader.import_default_modules()
    for module in _MODULES:
        importlib.import_module(module)
    pool = _WorkerPool()
    try:
        for line in sys.stdin:
            pids = pool.resize(*_parse(line))
            print(json.dumps({"pids": pids}), flush=True)
    finally:
        pool.stop(0)


if __name__ == "__main__":
    main()
