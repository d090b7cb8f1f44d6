"""Loss and perplexity of a data set, with or without an adapter."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import asdict, dataclass
from functools import cached_property
from queue import SimpleQueue

from peft import PeftModel

from hetrain.config import DEFAULT_MODEL, BatchingConfig, EvaluationSpec, LoraConfig
from hetrain.data.dataset import RawRow
from hetrain.data.packing import MicroBatch, micro_batches, pack
from hetrain.data.shared_prompt import shared_prompts
from hetrain.data.tokenization import Row, tokenize_rows
from hetrain.nn.adapter_files import base_model_of
from hetrain.nn.lora import add_adapter, load_adapter
from hetrain.nn.replica import Replica
from hetrain.public.errors import Interrupted
from hetrain.train.adapter_base import require_base
from hetrain.train.hints import OnPrepare, ignore_progress
from hetrain.train.records import add_evaluation
from hetrain.train.session import Session, open_base, open_session
from hetrain.train.signals import Stop, never
from hetrain.train.step import run_evaluation, share_cores, step_threads
from hetrain.train.updater import Tensors

_STOP_POLL_S = 0.5


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
        tokens=batching.evaluation_tokens,
    ) as session:
        # A fresh adapter, whose B is zero, changes nothing.
        adapted = (
            load_adapter(session.split, adapter)
            if adapter
            else add_adapter(session.split, LoraConfig(r=1, alpha=1), 0)
        )
        try:
            evaluator = Evaluator(session, adapted, rows, batching)
            share_cores(evaluator.at_once)
            evaluation = evaluator()
        except KeyboardInterrupt:
            raise Interrupted("stopped") from None
    if adapter:
        add_evaluation(adapter, spec.dataset, asdict(evaluation) | {"data": asdict(spec.data)})
    return evaluation


class Evaluator:
    """Evaluates the same rows again and again, for one thread.

    Args:
        session: the model, and the way to the workers.
        model: the adapted model.
        rows: at least one.
        batching: how they become micro-batches, and how many of these are computed at once.
    """

    def __init__(
        self, session: Session, model: PeftModel, rows: Sequence[Row], batching: BatchingConfig
    ) -> None:
        prompts = shared_prompts(rows)
        packed = pack(rows, batching.evaluation_tokens, range(len(rows)), prompts)
        self._batches = list(micro_batches(rows, packed, prompts))
        self.at_once = min(batching.in_flight, len(self._batches))
        self._session, self._model = session, model

    @cached_property
    def _replicas(self) -> list[Replica]:
        return self._session.replicas(self._model, self.at_once)

    def __call__(
        self,
        values: Tensors | None = None,
        on_batch: Callable[[int, int], object] = ignore_progress,
        stop: Stop = never,
    ) -> Evaluation:
        """Loss of the model with the adapter `values`, or with those that it had at the first call.

        Args:
            values: by parameter name.
            on_batch: called with the number of micro-batches that are computed, and of all.
            stop: called meanwhile; what it raises ends the evaluation and closes the session's channel.

        Raises:
            NotFinite: the model makes values that are not finite.
            HetrainError: broker or workers fail.
        """
        begin = time.perf_counter()
        if values is not None:
            for replica in self._replicas:
                replica.load(values)
        total = sum(self._losses(on_batch, stop))
        targets = sum(batch.n_targets for batch in self._batches)
        loss = total / targets
        return Evaluation(
            loss=loss,
            perplexity=math.exp(loss) if loss < 700 else math.inf,
            targets=targets,
            tokens=sum(sum(batch.lengths) for batch in self._batches),
            seconds=time.perf_counter() - begin,
        )

    def _losses(self, on_batch: Callable[[int, int], object], stop: Stop) -> list[float]:
        """Of the micro-batches, in their order."""
        free: SimpleQueue[Replica] = SimpleQueue()
        for replica in self._replicas:
            free.put(replica)

        def one(batch: MicroBatch) -> float:
            replica = free.get()
            try:
                return run_evaluation(replica, batch)
            finally:
                free.put(replica)

        with step_threads(self.at_once, self._session.channel.close) as pool:
            on_batch(0, len(self._batches))
            futures = [pool.submit(one, batch) for batch in self._batches]
            running = set(futures)
            while running:
                finished, running = wait(running, _STOP_POLL_S, FIRST_COMPLETED)
                stop()
                for future in finished:
                    future.result()
                if finished:
                    on_batch(len(futures) - len(running), len(futures))
            return [future.result() for future in futures]
