"""Loss and perplexity of a data set, with or without an adapter."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from peft import PeftModel

from hetrain.data.packing import MicroBatch, micro_batches, pack
from hetrain.data.tokenization import read_rows
from hetrain.nn.lora import LoraSettings, add_adapter, load_adapter
from hetrain.nn.replica import Replica
from hetrain.public.errors import Interrupted
from hetrain.train.session import Session, open_base, open_session
from hetrain.train.settings import BatchSettings, OutsourcingSettings
from hetrain.train.step import run_evaluation, share_cores


@dataclass(frozen=True)
class Evaluation:
    """Mean −log p over `targets` supervised tokens, and its exponential."""

    loss: float
    perplexity: float
    targets: int
    tokens: int
    seconds: float


def evaluate(
    dataset: Path,
    model: str,
    adapter: Path | None,
    outsourcing: OutsourcingSettings,
    broker_url: str | None,
    device: str,
    settings: BatchSettings,
    in_flight: int,
) -> Evaluation:
    """Evaluates `dataset` with the adapter in `adapter` (None: the base model).

    Raises:
        HetrainError: whatever goes wrong; the data set is checked in whole before anything starts.
    """
    base = open_base(model)
    rows = read_rows(dataset, base.tokenizer, settings.max_length)
    batches = list(micro_batches(rows, pack(rows, settings.micro_batch_tokens, range(len(rows)))))
    with open_session(
        base, outsourcing, broker_url, device, micro_batches=len(batches), in_flight=in_flight
    ) as session:
        # Without an adapter a fresh one stands in: its B is zero, so it changes nothing.
        adapted = (
            add_adapter(session.split, LoraSettings(r=1, alpha=1), 0)
            if adapter is None
            else load_adapter(session.split, adapter)
        )
        begin = time.perf_counter()
        total = sum(_losses(session, adapted, batches, min(in_flight, len(batches))))
        seconds = time.perf_counter() - begin
    targets = sum(batch.n_targets for batch in batches)
    loss = total / targets
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return Evaluation(loss, perplexity, targets, sum(batch.n_tokens for batch in batches), seconds)


def _losses(session: Session, model: PeftModel, batches: list[MicroBatch], in_flight: int) -> list[float]:
    share_cores(in_flight)
    free: SimpleQueue[Replica] = SimpleQueue()
    for replica in session.replicas(model, in_flight):
        free.put(replica)

    def one(batch: MicroBatch) -> float:
        replica = free.get()
        try:
            return run_evaluation(replica, batch)
        finally:
            free.put(replica)

    with ThreadPoolExecutor(in_flight, thread_name_prefix="micro-batch") as pool:
        try:
            return list(pool.map(one, batches))
        except BaseException as error:
            session.channel.close()  # lets the other threads fail soon
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted("stopped") from None
            raise
