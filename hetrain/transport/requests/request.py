"""What is asked of the workers: tasks, the memory behind their blobs, and how long to wait for what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hetrain.public.broker.connection import FULL_S
from hetrain.public.protocol.keys import PREPARE_LIMIT_S, RUN_LIMIT_S
from hetrain.public.protocol.messages import Blob, EvaluateTask, Header, PrepareTask, new_token
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
        attempts: how often a request whose worker, blobs or result were lost is sent again.
    """

    no_worker_s: float = 60.0
    deadline_s: float = 120.0
    run_s: float = RUN_LIMIT_S
    prepare_s: float = PREPARE_LIMIT_S
    outage_s: float = 60.0
    full_s: float = FULL_S
    attempts: int = 5


@dataclass(frozen=True, eq=False)
class Source:
    """A blob, and the memory from which it can be uploaded again."""

    blob: Blob
    parts: Sequence[memoryview]


@dataclass(frozen=True, eq=False)
class Request:
    """One task.

    Attributes:
        task: the message.
        source: its input, None when it has none but the plan.
        run_limit_s: for how long a living worker may run it.
    """

    task: PrepareTask | EvaluateTask
    source: Source | None
    run_limit_s: float

    @property
    def id(self) -> str:
        """The request's token; also the id of its Celery task, however often it is sent."""
        return self.task.request

    def __str__(self) -> str:
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
