"""A session: the client's part of a model, and a channel to workers that hold the rest."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hetrain.config import OutsourcingConfig
from hetrain.local.launcher import start_embedded
from hetrain.nn.replica import Replica
from hetrain.nn.split import SplitModel, split_model
from hetrain.public.errors import ModelError, UsageError
from hetrain.public.model.files import ModelFiles, cache_directory, resolve
from hetrain.public.protocol.messages import Completion
from hetrain.public.protocol.plan import Plan
from hetrain.public.protocol.product import ProductKey
from hetrain.public.system import available_cores, flush_denormals
from hetrain.secret.engine import ClientEngine, JobOptions, Sealer, client_engine
from hetrain.secret.engines.rlwe.hints import HintStore, hint_bytes, sketches_of
from hetrain.secret.verification import Sketch
from hetrain.transport.celery_channel import CeleryChannel
from hetrain.transport.channel import Channel

_MICRO_BATCHES_FOR_HINTS = 4
_SPARE_BYTES = 1 << 30

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseModelFiles:
    """A model's public files, before anything heavy is loaded."""

    name_or_path: str
    files: ModelFiles
    tokenizer: PreTrainedTokenizerBase

    @property
    def reference(self) -> str:
        """What `from_pretrained` takes to find the same base model: a directory, or the hub id as given."""
        local = Path(self.name_or_path).expanduser().is_dir() or "/" not in self.name_or_path
        return str(self.files.directory.resolve()) if local else self.name_or_path


def open_base(name_or_path: str) -> BaseModelFiles:
    """Finds the model and loads its tokenizer.

    Raises:
        ModelError: there is no such model, or it has no tokenizer.
    """
    checkpoint = resolve(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"the tokenizer cannot be loaded: {error}", where=str(checkpoint.directory)
        ) from error
    return BaseModelFiles(name_or_path, checkpoint, tokenizer)


@dataclass(frozen=True)
class Session:
    """A split model, and a channel to workers that have agreed to its plan."""

    split: SplitModel
    channel: Channel
    sealer: Sealer
    worker: Completion

    def replicas(self, model: PeftModel, count: int) -> list[Replica]:
        """`count` replicas of an adapted model on this session's channel."""
        return [Replica(self.split, model, self.channel, self.sealer) for _ in range(count)]


@contextmanager
def open_session(
    base: BaseModelFiles,
    outsourcing: OutsourcingConfig,
    workers: str | None,
    device: str,
    log_file: Path | None = None,
    *,
    micro_batches: int = 1,
    in_flight: int = 1,
    max_bytes_in_flight: int | None = None,
) -> Iterator[Session]:
    """Splits the model, finds workers (or starts one on this machine), and agrees with them on the plan.

    Args:
        base: the model.
        outsourcing: what leaves, under which engine.
        workers: URL of the workers' broker; None starts a broker and one worker on this machine, for as long
            as the session lasts.
        device: torch device of the client's own layers.
        log_file: log of an embedded broker and worker; None takes a temporary one.
        micro_batches: number to come; decides whether hints pay.
        in_flight: number of them at once; an embedded worker runs as many tasks, as far as it has cores.
        max_bytes_in_flight: see `BatchingConfig`.

    Raises:
        HetrainError: any of its kinds but `DatasetError`.
    """
    engine = client_engine(outsourcing.engine)
    if not engine.hides:
        _log.warning("engine %r hides NOTHING: workers and broker see activations in clear", engine.name)
    target = _device(device)
    with ExitStack() as stack:
        stack.callback(flush_denormals, flush_denormals())  # before any thread starts, which inherits it
        if workers is None:
            if log_file is None:
                scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="hetrain-log-"))
                log_file = Path(scratch) / "worker.log"
            concurrency = min(in_flight, available_cores())
            embedded = stack.enter_context(
                start_embedded(base.name_or_path, log_file, concurrency=concurrency)
            )
            channel = CeleryChannel(
                embedded.url, health_check=embedded.failure, max_bytes_in_flight=max_bytes_in_flight
            )
        else:
            channel = CeleryChannel(workers, max_bytes_in_flight=max_bytes_in_flight)
        stack.callback(channel.close)
        # Meanwhile an embedded worker imports and tests its kernels.
        split, hints = _split(base, outsourcing, engine, micro_batches)
        split.causal.to(target)
        plan = split.plan
        if hints is not None:
            stack.callback(hints.close)
        sealer = engine.open(plan, JobOptions(outsourcing.activation_bits, hints))
        worker = channel.prepare(plan.model, engine.name, plan.to_bytes(), plan.digest, sealer.setup)
        _log.info("worker %s on %s serves %s", worker.worker, worker.device, plan.model)
        yield Session(split, channel, sealer, worker)


def _split(
    base: BaseModelFiles, outsourcing: OutsourcingConfig, engine: ClientEngine, micro_batches: int
) -> tuple[SplitModel, HintStore | None]:
    """The split model, and the job's store of hints, if it keeps any."""
    if not wants_hints(engine, outsourcing.hints, micro_batches):
        return split_model(base.files, outsourcing.outsource), None
    # Held by their hints alone from here on, each until it has done its check.
    sketches: dict[ProductKey, Sketch] = {}
    split = split_model(
        base.files,
        outsourcing.outsource,
        lambda group, matrix: sketches.update(sketches_of(group, matrix)),
    )
    return split, open_hints(split.plan, sketches, required=bool(outsourcing.hints))


def wants_hints(engine: ClientEngine, asked: bool | None, micro_batches: int) -> bool:
    """Whether a job should keep hints, if there is room for them.

    Args:
        engine: the job's engine.
        asked: the user's setting; None leaves the choice to this function.
        micro_batches: number that the job will make; the first ones only fill the store.

    Raises:
        UsageError: the user asked for hints of an engine that has none.
    """
    if asked and not engine.has_hints:
        raise UsageError(f"engine {engine.name!r} has no hints", field="hints", hint="use `engine` rlwe")
    if asked is None:
        return engine.has_hints and micro_batches >= _MICRO_BATCHES_FOR_HINTS
    return asked


def open_hints(plan: Plan, sketches: Mapping[ProductKey, Sketch], *, required: bool) -> HintStore | None:
    """The job's store of hints; None when the disk has no room for it and it is not `required`.

    Raises:
        UsageError: there is no room, and it is required.
    """
    directory, needed = cache_directory(), hint_bytes(plan)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
        if free < needed + _SPARE_BYTES:
            raise OSError(f"only {free / 1e9:.1f} GB are free")
        return HintStore(plan, sketches, directory)
    except OSError as error:
        text = f"hints take {needed / 1e9:.1f} GB of disk: {error}"
        if required:
            raise UsageError(
                text, where=str(directory), hint="make room, set HETRAIN_CACHE, or turn off `hints`"
            ) from error
        _log.warning("%s: %s; the job keeps none", directory, text)
        return None


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device {name!r} cannot be used here", field="device", hint=str(error).splitlines()[0]
        ) from error
    return device
