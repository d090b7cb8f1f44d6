"""Whether this machine and the workers can run a job, and on which devices."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import hetrain
from hetrain.inspection.probe import ProbeResult, probe_workers
from hetrain.local.launcher import start_embedded
from hetrain.nn.checkpoint_io.checkpoint_names import tensor_names
from hetrain.nn.checkpoint_io.loading import skeleton, tensor_of
from hetrain.nn.families import block_linears
from hetrain.public.broker.connection import plaintext_warning, redacted
from hetrain.public.broker.server_info import BrokerReport, ask_broker
from hetrain.public.errors import HetrainError, NoWorker, UsageError, WireError
from hetrain.public.model.files import ModelFiles, label_of, resolve
from hetrain.public.model.quantization import Norms
from hetrain.public.protocol.messages import QUEUE, WorkerReport
from hetrain.public.protocol.plan import Group, Member, Plan
from hetrain.public.protocol.product import Product
from hetrain.public.settings import broker_address
from hetrain.public.system import available_cores
from hetrain.secret.engine import ENGINES, ClientEngine, JobOptions
from hetrain.secret.engines.rlwe.hints import client_hints
from hetrain.secret.engines.rlwe.ring_kernels import ring_kernels
from hetrain.secret.verification.job import Verification

_PACKAGES = ("torch", "transformers", "celery")
_EMBEDDED_MODEL = "smollm2-135m"  # a worker needs a model to serve; it loads none of it
_PROBE = Plan(
    model="doctor",
    groups=(
        Group(
            name="probe",
            members=(Member(module="probe", tensor="probe", out_features=16),),
            in_features=16,
            forward=Norms(l1=16, squares=16),
            backward=Norms(l1=16, squares=16),
            digest="0" * 64,
        ),
    ),
)
_FIRST_S, _EMBEDDED_FIRST_S, _SETTLE_S = 5.0, 60.0, 15.0


@dataclass(frozen=True)
class ClientHalf:
    """The client half of an engine: whether it hides anything, and why it is not usable (empty if it is)."""

    name: str
    hides: bool
    reason: str


@dataclass(frozen=True)
class ClientReport:
    """This machine: versions by package, cores that this process may use, version of its kernels, engines."""

    versions: dict[str, str]
    cores: int
    kernels: str
    engines: tuple[ClientHalf, ...]


@dataclass(frozen=True)
class DoctorReport:
    """The state of client, broker and workers.

    Attributes:
        client: this machine.
        model: what workers call the model that was asked about; empty if none was.
        embedded: whether broker and worker were started for this report.
        broker: None when it could not be reached.
        workers: all that answered.
        warnings: one sentence each.
        failure: why no job can run; None when one can.
    """

    client: ClientReport
    model: str
    embedded: bool
    broker: BrokerReport | None
    workers: tuple[WorkerReport, ...]
    warnings: tuple[str, ...]
    failure: HetrainError | None

    @property
    def runnable(self) -> tuple[ClientHalf, ...]:
        """Engines whose client half can be used here, and whose worker half is ready on some worker."""
        ready = {
            engine.name
            for worker in self.workers
            if _serves(worker, self.model)
            for engine in worker.engines
            if engine.state == "ready"
        }
        return tuple(half for half in self.client.engines if not half.reason and half.name in ready)


def diagnose(workers: str | None, model: str | None = None) -> DoctorReport:
    """Inspects client, broker and workers.

    Never raises a `HetrainError`: see `DoctorReport.failure`.

    Args:
        workers: URL of the workers' broker; None starts an embedded broker and a worker meanwhile.
        model: the model that a job is to train; None asks about none.
    """
    client = _client()
    label = "" if model is None else label_of(model)
    broker: BrokerReport | None = None
    found = ProbeResult((), ())
    try:
        if model is not None:
            _require_splittable(resolve(model))
        with _target(workers, model or _EMBEDDED_MODEL) as target:
            broker = ask_broker(target.url, pings=5)
            found = probe_workers(
                target.url,
                first_s=target.first_s,
                settle_s=_SETTLE_S,
                expected=target.workers,
                health_check=target.health_check,
            )
            failure = _no_worker(target, found, label)
    except HetrainError as error:
        failure = error
    return DoctorReport(
        client=client,
        model=label,
        embedded=workers is None,
        broker=broker,
        workers=found.workers,
        warnings=(
            *_of_client(client),
            *_of_address(workers),
            *_of_broker(broker),
            *_of_workers(found),
        ),
        failure=failure,
    )


@dataclass(frozen=True)
class _Target:
    """A broker, its number of workers if known, the wait for a first answer, and a check of both."""

    url: str
    workers: int | None
    first_s: float
    health_check: Callable[[], HetrainError | None]


@contextmanager
def _target(broker_url: str | None, model: str) -> Iterator[_Target]:
    if broker_url is not None:
        yield _Target(broker_address(broker_url), None, _FIRST_S, lambda: None)
        return
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="hetrain-log-"))
        embedded = stack.enter_context(start_embedded(model, Path(scratch) / "worker.log"))
        yield _Target(embedded.url, 1, _EMBEDDED_FIRST_S, embedded.failure)


def _require_splittable(files: ModelFiles) -> None:
    """Raises `ModelError` for a model that no job could train, as far as its files' names and shapes tell."""
    causal = skeleton(files)
    tensors = tensor_names(causal, files)
    for name in block_linears(causal):
        tensor_of(tensors, files, f"{name}.weight")


def _client() -> ClientReport:
    versions = {"hetrain": hetrain.__version__, "python": platform.python_version()}
    return ClientReport(
        versions=versions | {package: _version(package) for package in _PACKAGES},
        cores=available_cores(),
        kernels=ring_kernels().name,
        engines=tuple(_half(engine) for engine in ENGINES.values()),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _of_client(client: ClientReport) -> Iterator[str]:
    if client.kernels == "torch":
        yield (
            "this client's kernels are not compiled, and encryption takes many times as long; "
            "install a C compiler, then hetrain again"
        )


def _no_weights(product: Product) -> torch.Tensor:
    raise NotImplementedError(f"{product} is never verified")


def _half(engine: ClientEngine) -> ClientHalf:
    """Opens the engine for a job on one small matrix, which takes all that it needs of this machine."""
    reason = ""
    try:
        hints = client_hints() if engine.needs_hints else None
        engine.open(_PROBE, JobOptions(Verification({}, _no_weights), hints=hints))
    except (HetrainError, ImportError) as error:
        reason = str(error)
    return ClientHalf(engine.name, engine.hides, reason)


def _no_worker(target: _Target, found: ProbeResult, model: str) -> HetrainError | None:
    """Why no worker can take a job; None when one can."""
    listening = [worker for worker in found.workers if _serves(worker)]
    if any(_serves(worker, model) for worker in listening):
        return None
    if listening:
        served = sorted({label for worker in listening for label in worker.models})
        return NoWorker(
            f"no worker serves {model!r}, only: {', '.join(served) or 'no model'}",
            where=redacted(target.url),
            hint="start one with HETRAIN_MODELS=<name or path> in its environment",
        )
    if found.refused and not found.workers:
        return WireError(
            "no worker's answer can be read",
            where=redacted(target.url),
            hint="client and worker probably run different versions of hetrain",
        )
    return NoWorker(
        f"no worker answered on queue {QUEUE!r} within {target.first_s:.0f} s",
        where=redacted(target.url),
        hint=f"start one with HETRAIN_BROKER_URL=... celery -A tasks worker -Q {QUEUE}"
        if target.workers is None
        else "this machine may be too busy to start one",
    )


def _of_address(workers: str | None) -> Iterator[str]:
    with suppress(UsageError):
        if workers and (warning := plaintext_warning(workers)):
            yield warning


def _of_broker(broker: BrokerReport | None) -> Iterator[str]:
    if broker is None:
        return
    if broker.maxmemory is None or broker.policy is None:
        yield "the broker does not report its maxmemory and policy (it refuses INFO to this user)"
    if broker.maxmemory == 0:
        yield "the broker has no maxmemory: ciphertexts may fill its machine's memory; set a limit"
    if broker.policy not in (None, "noeviction"):
        yield (
            f"the broker's maxmemory-policy is {broker.policy}: when it is full it may drop ciphertexts of "
            "running jobs; set noeviction"
        )


def _of_workers(found: ProbeResult) -> Iterator[str]:
    for error in found.refused:
        yield f"a worker's answer was refused: {error}"
    for worker in found.workers:
        if worker.hetrain != hetrain.__version__:
            yield (
                f"worker {worker.worker} runs hetrain {worker.hetrain}, this client {hetrain.__version__}; "
                "install the same version on both sides"
            )
        if not _serves(worker):
            yield f"worker {worker.worker} does not take from queue {QUEUE!r}; start it with -Q {QUEUE}"


def _serves(worker: WorkerReport, model: str = "") -> bool:
    """Whether it takes tasks, from the common queue or from that of its shards, and for `model` if given."""
    return (not model or model in worker.models) and any(
        queue == QUEUE or queue.startswith(f"{QUEUE}.") for queue in worker.queues
    )
