"""A session: the client's part of a model, and a channel to workers that hold the rest."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from hetrain.config import OutsourcingConfig
from hetrain.data.tokenization import load_tokenizer
from hetrain.local.launcher import start_embedded
from hetrain.nn.prefix import PrefixStore
from hetrain.nn.replica import Replica
from hetrain.nn.split import SplitModel, split_model
from hetrain.public.broker.connection import plaintext_warning
from hetrain.public.errors import UsageError
from hetrain.public.lattice.parameters import SLOTS, parameters_for
from hetrain.public.lattice.result_format import ResultFormat
from hetrain.public.model.files import ModelFiles, resolve
from hetrain.public.protocol.messages import Completion
from hetrain.public.protocol.plan import Group, Plan, stack_group
from hetrain.public.protocol.product import Product, ProductKey, products_of
from hetrain.public.system import available_cores, flush_denormals
from hetrain.secret.engine import JobOptions, Sealer, client_engine
from hetrain.secret.engines.rlwe.hints import client_hints
from hetrain.secret.process import protect_memory
from hetrain.secret.verification.job import Verification, kept_rows
from hetrain.secret.verification.parts import Weights
from hetrain.secret.verification.rows import CheckRows
from hetrain.train.hints import OnPrepare, ignore_progress, make_hints
from hetrain.transport.celery_channel import CeleryChannel
from hetrain.transport.channel import Channel

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseModelFiles:
    """A model's public files, before anything heavy is loaded."""

    name_or_path: str
    files: ModelFiles
    tokenizer: PreTrainedTokenizerBase


def open_base(name_or_path: str) -> BaseModelFiles:
    """Finds the model and loads its tokenizer.

    Raises:
        ModelError: there is no such model, or it has no tokenizer.
    """
    files = resolve(name_or_path)
    return BaseModelFiles(name_or_path, files, load_tokenizer(files))


@dataclass(frozen=True)
class Session:
    """A split model, and a channel to workers that have agreed to its plan."""

    split: SplitModel
    channel: Channel
    sealer: Sealer
    worker: Completion

    def replicas(self, model: PeftModel, count: int, activation_memory: int | None = None) -> list[Replica]:
        """`count` replicas of an adapted model on this session's channel, with one store of prefixes.

        They share `activation_memory`, in bytes; None is no limit.
        """
        prefixes, share = PrefixStore(), None if activation_memory is None else activation_memory // count
        return [Replica(self.split, model, self.channel, self.sealer, prefixes, share) for _ in range(count)]


@contextmanager
def open_session(
    base: BaseModelFiles,
    outsourcing: OutsourcingConfig,
    workers: str | None,
    device: str,
    log_file: Path | None = None,
    *,
    in_flight: int = 1,
    max_bytes_in_flight: int | None = None,
    tokens: int = 1,
    on_prepare: OnPrepare = ignore_progress,
) -> Iterator[Session]:
    """Splits the model, finds workers (or starts one on this machine), and agrees with them on the plan.

    Hints that are missing are made.

    Args:
        base: the model.
        outsourcing: what leaves, under which engine.
        workers: URL of the workers' broker; None starts a broker and one worker on this machine, for as long
            as the session lasts.
        device: torch device of the client's own layers.
        log_file: log of an embedded broker and worker; None takes a temporary one.
        in_flight: number of them at once; an embedded worker runs as many tasks, as far as it has cores.
        max_bytes_in_flight: see `BatchingConfig`.
        tokens: the most of a micro-batch.
        on_prepare: hears of hints that are being made.

    Raises:
        HetrainError: any of its kinds but `DatasetError`.
    """
    engine = client_engine(outsourcing.engine)
    if engine.hides:
        protect_memory()
    else:
        _log.warning("engine %r hides NOTHING: workers and broker see activations in clear", engine.name)
    if workers and (warning := plaintext_warning(workers)):
        _log.warning(warning)
    target = torch_device(device)
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
        hints = client_hints() if engine.needs_hints else None
        # Meanwhile an embedded worker imports and tests its kernels.
        kept: dict[ProductKey, CheckRows] = {}
        split = split_model(
            base.files,
            outsourcing.patterns,
            lambda group, matrix: kept.update(kept_rows(group, matrix)),
        )
        split.causal.to(target)
        channel.budget.require(largest_product(split.plan, tokens))
        plan, verification = split.plan, Verification(kept, weights_of(base.files), outsourcing.verify_rows)
        sealer = engine.open(plan, JobOptions(verification, outsourcing.activation_bits, hints))
        worker = channel.prepare(plan.model, engine.name, plan.to_bytes(), plan.digest, sealer.setup)
        _log.info("worker %s on %s serves %s", worker.worker, worker.device, plan.model)
        if hints is not None:
            make_hints(hints, plan, channel, verification.weights, on_prepare)
        yield Session(split, channel, sealer, worker)


def largest_product(plan: Plan, tokens: int) -> int:
    """Bytes of the largest operand and its result, encrypted by `rlwe`; other engines take more."""
    sizes = ResultFormat(parameters_for(min(tokens, SLOTS)))
    return max(sizes.operand_bytes(each.k) + sizes.result_bytes(each.n) for each in products_of(plan))


def weights_of(files: ModelFiles) -> Weights:
    """Loads the matrix of a product; both directions of a group, one after the other, load it once."""

    @lru_cache(maxsize=1)
    def matrix_of(group: Group) -> torch.Tensor:
        return stack_group(group.members, files.read).values

    def load(product: Product) -> torch.Tensor:
        matrix = matrix_of(product.group)
        return matrix if product.direction == "forward" else matrix.t()

    return load


def torch_device(name: str) -> torch.device:
    """The device of this name. Raises `UsageError` where there is none."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device {name!r} cannot be used here", field="device", hint=str(error).splitlines()[0]
        ) from error
    return device
