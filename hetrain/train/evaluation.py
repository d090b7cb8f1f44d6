"""Loss and perplexity of a data set, with or without an adapter."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from queue import SimpleQueue

from peft import PeftModel

from hetrain.config import DEFAULT_MODEL, BatchingConfig, EvaluationSpec, LoraConfig
from hetrain.data.dataset import RawRow
from hetrain.data.packing import MicroBatch, micro_batches, pack
from hetrain.data.tokenization import Row, tokenize_rows
from hetrain.nn.adapter_files import base_model_of
from hetrain.nn.lora import add_adapter, load_adapter
from hetrain.nn.replica import Replica
from hetrain.public.errors import Interrupted
from hetrain.train.adapter_base import require_base
from hetrain.train.hints import OnPrepare, ignore_progress
from hetrain.train.records import add_evaluation
from hetrain.train.session import Session, open_base, open_session
from hetrain.train.step import run_evaluation, share_cores, step_threads


@dataclass(frozen=True)
class Evaluation:
    """Mean −log p over `targets` supervised tokens, and its exponential."""

    loss: float
    perplexity: float
    targets: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f} · perplexity {self.perplexity:.2f} · "
            f"{self.targets} of {self.tokens} tokens supervised · {self.seconds:.1f} s"
        )


def evaluate(
    spec: EvaluationSpec, raw_rows: Sequence[RawRow], on_prepare: OnPrepare = ignore_progress
) -> Evaluation:
    """Evaluates a data set on the base model, with an adapter if `spec` names one.

    Args:
        spec: adapter, model and settings.
        raw_rows: the rows of its data set.
        on_prepare: called with the number of hints that are made and to be made, after each.

    Raises:
        HetrainError: whatever goes wrong; all rows are tokenized before anything starts.
    """
    batching, adapter = spec.batching, spec.adapter
    base = open_base(spec.model or (base_model_of(adapter) if adapter else DEFAULT_MODEL))
    if adapter and spec.model:
        require_base(adapter, spec.model, base.files)
    rows = tokenize_rows(raw_rows, base.tokenizer, batching.longest_row, spec.data)
    with open_session(
        base,
        spec.outsourcing,
        spec.workers,
        spec.device,
        on_prepare=on_prepare,
        in_flight=batching.in_flight,
        max_bytes_in_flight=batching.max_bytes_in_flight,
        tokens=batching.tokens_per_micro_batch,
    ) as session:
        # A fresh adapter, whose B is zero, changes nothing.
        adapted = (
            load_adapter(session.split, adapter)
            if adapter
            else add_adapter(session.split, LoraConfig(r=1, alpha=1), 0)
        )
        try:
            evaluation = evaluate_rows(session, adapted, rows, batching)
        except KeyboardInterrupt:
            raise Interrupted("stopped") from None
    if adapter:
        add_evaluation(adapter, spec.dataset, asdict(evaluation) | {"data": asdict(spec.data)})
    return evaluation


def evaluate_rows(
    session: Session, model: PeftModel, rows: Sequence[Row], batching: BatchingConfig
) -> Evaluation:
    """Loss of an adapted model on `rows`, of which there is at least one.

    Raises:
        NotFinite: the model makes values that are not finite.
        HetrainError: broker or workers fail.
    """
    batches = list(micro_batches(rows, pack(rows, batching.tokens_per_micro_batch, range(len(rows)))))
    begin = time.perf_counter()
    total = sum(_losses(session, model, batches, min(batching.in_flight, len(batches))))
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

    with step_threads(in_flight, session.channel.close) as pool:
        return list(pool.map(one, batches))
