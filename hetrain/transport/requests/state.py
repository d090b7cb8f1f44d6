"""Requests: what is asked of the workers, and what is known about each of them while it is on its way."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic

from hetrain.public.broker.connection import FULL_S
from hetrain.public.errors import HetrainError
from hetrain.public.protocol.messages import (
    QUEUE,
    Blob,
    Completion,
    EvaluateTask,
    Header,
    PrepareTask,
    new_token,
)
from hetrain.public.protocol.product import Product, RowRange


@dataclass(frozen=True)
class Timeouts:
    """How long a channel waits, in seconds, and how often it asks again.

    Attributes:
        no_worker_s: for a first sign of any worker.
        deadline_s: for a request that waits while others are run, before it is sent again.
        run_s: for a request that a living worker runs.
        prepare_s: for a worker that loads a model.
        outage_s: for a broker that does not answer.
        full_s: for memory in a full broker.
        attempts: how often a request whose worker or blobs were lost is sent again.
    """

    no_worker_s: float = 60.0
    deadline_s: float = 120.0
    run_s: float = 600.0
    prepare_s: float = 1800.0
    outage_s: float = 60.0
    full_s: float = FULL_S
    attempts: int = 5


@dataclass(frozen=True, eq=False)
class Source:
    """A blob, and the memory from which it can be uploaded again."""

    blob: Blob
    parts: Sequence[memoryview]


@dataclass(eq=False)
class Request:
    """One task on its way. Threads wait for it; the collector changes it.

    Attributes:
        task: the message.
        source: its input, None when it has none but the plan.
        run_limit_s: for how long a living worker may run it.
        queue: where it is sent.
        done_event: set at every outcome; the requests of one product share it.
        asked_at: when it was sent first (monotonic clock), None before.
        sent_at: when it was sent last, None before.
        started_at: when a worker reported its start, None before.
        sends: how often it was sent at all.
        resends: how often it was sent again because a worker or a blob was lost.
        refused_on: queues of workers that do not serve it, for each refusal.
        unserved_at: since when nobody announces to serve its group, None while somebody does.
        unleased: how many looks in a row found its worker gone.
        is_lost: whether it must be sent again, with its blobs where they are missing.
    """

    task: PrepareTask | EvaluateTask
    source: Source | None
    run_limit_s: float
    queue: str = QUEUE
    done_event: threading.Event = field(default_factory=threading.Event)
    asked_at: float | None = None
    sent_at: float | None = None
    started_at: float | None = None
    worker: str = ""
    sends: int = 0
    resends: int = 0
    refused_on: list[str] = field(default_factory=list)
    unserved_at: float | None = None
    unleased: int = 0
    is_lost: bool = False
    _settled: threading.Event = field(default_factory=threading.Event)
    _outcome: Completion | HetrainError | None = None

    @property
    def id(self) -> str:
        """The request's token; also the id of its Celery task, however often it is sent."""
        return self.task.request

    @property
    def is_settled(self) -> bool:
        """Whether the outcome is known."""
        return self._settled.is_set()

    @property
    def output(self) -> Blob | None:
        """Where its result lies, once that is known."""
        return self._outcome.output if isinstance(self._outcome, Completion) else None

    def settle(self, outcome: Completion | HetrainError) -> None:
        """Wakes who waits. Only the first outcome counts."""
        if not self.is_settled:
            self._outcome = outcome
            self._settled.set()
            self.done_event.set()

    def outcome(self, wait_s: float) -> Completion | None:
        """The completion; None after `wait_s` seconds without one. Raises the error it was settled with."""
        if not self._settled.wait(wait_s):
            return None
        if isinstance(self._outcome, HetrainError):
            raise self._outcome
        return self._outcome

    def mark_sent(self) -> None:
        """Notes that it is being sent now."""
        self.sent_at, self.started_at, self.unleased, self.is_lost = monotonic(), None, 0, False
        self.asked_at = self.asked_at or self.sent_at
        self.sends += 1

    def mark_started(self, worker: str) -> None:
        """Notes that a worker has begun it now."""
        self.started_at, self.worker, self.unleased = monotonic(), worker, 0

    def reopen(self) -> None:
        """Forgets the outcome: its result was lost, so it must be sent again."""
        self._outcome, self.is_lost = None, True
        self._settled.clear()

    def summary(self) -> str:
        """One line for messages."""
        task = self.task
        text = f"job …{task.job[-4:]} model {task.model}"
        if isinstance(task, EvaluateTask):
            return f"{text} {task.group} {task.direction} rows {task.start}:{task.stop}"
        return f"{text} prepare engine {task.engine}"


def prepare_task(model: str, engine: str, plan: Blob, setup: Header) -> PrepareTask:
    """The message that opens a job, whose plan lies in `plan` under its digest."""
    return PrepareTask(
        request=new_token(),
        job=plan.job,
        model=model,
        engine=engine,
        plan=plan,
        plan_digest=plan.token,
        setup=dict(setup),
    )


def evaluate_task(
    prepared: PrepareTask,
    request: str,
    product: Product,
    header: Header,
    rows: RowRange,
    operand: Blob,
) -> EvaluateTask:
    """The message for one range of rows, in the job that `prepared` opened."""
    return EvaluateTask(
        request=request,
        job=prepared.job,
        model=prepared.model,
        engine=prepared.engine,
        plan=prepared.plan,
        plan_digest=prepared.plan_digest,
        group=product.group.name,
        direction=product.direction,
        start=rows[0],
        stop=rows[1],
        header=dict(header),
        input=operand,
    )
