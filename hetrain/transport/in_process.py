"""A channel without a queue: the worker's part runs in this process, for tests and experiments."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from hetrain.public.errors import Interrupted, UsageError
from hetrain.public.protocol.messages import (
    Blob,
    Completion,
    EvaluateTask,
    Header,
    PrepareTask,
    new_token,
    parse,
)
from hetrain.public.protocol.product import Operand, Part, Product
from hetrain.transport.channel import NO_HEADER, Accept, Reply, accept_any
from hetrain.transport.requests.request import evaluate_task, prepare_task

Handler = Callable[[EvaluateTask, memoryview], list[memoryview]]
Preparer = Callable[[PrepareTask, bytes], None]


class InProcessChannel:
    """Computes every product at once, in the calling thread, through the same messages as over a queue.

    Args:
        handler: evaluates a task on its payload.
        preparer: gets the job's plan; None accepts any.
    """

    def __init__(self, handler: Handler, preparer: Preparer | None = None) -> None:
        self._handler = handler
        self._preparer = preparer
        self._prepared: PrepareTask | None = None
        self._job = new_token()
        self._closed = False

    def prepare(
        self, model: str, engine: str, plan: bytes, plan_digest: str, setup: Header = NO_HEADER
    ) -> Completion:
        """See `Channel.prepare`."""
        blob = Blob(job=self._job, kind="plan", token=plan_digest, nbytes=len(plan))
        task = prepare_task(model, engine, blob, setup)
        task = parse(PrepareTask, task.to_json(), where="in-process channel")
        begun = perf_counter()
        if self._preparer is not None:
            self._preparer(task, plan)
        self._prepared = task
        return Completion(
            request=task.request, state="done", worker="local", device="local", seconds=perf_counter() - begun
        )

    def multiply(self, product: Product, operand: Operand, accept: Accept = accept_any) -> Reply:
        """See `Channel.multiply`. The result has one part."""
        if self._closed:
            raise Interrupted("the channel is closed")
        if self._prepared is None:
            raise UsageError("the channel must be prepared before something is sent")
        payload = memoryview(bytearray().join(operand.payload))
        blob = Blob(job=self._job, kind="in", token=new_token(), nbytes=payload.nbytes)
        task = evaluate_task(self._prepared, new_token(), product, operand.header, (0, product.n), blob)
        task = parse(EvaluateTask, task.to_json(), where="in-process channel")
        begun = perf_counter()
        data = memoryview(bytearray().join(self._handler(task, payload)))
        part = Part((0, product.n), data, worker="local", device="local", seconds=perf_counter() - begun)
        accept(part)
        return Reply((part,), payload.nbytes)

    def close(self) -> None:
        """See `Channel.close`."""
        self._closed = True
