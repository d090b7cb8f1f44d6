"""A channel without a queue: the worker's part runs in this process, for tests and experiments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

from hetrain.public.errors import HetrainError, Interrupted, UsageError
from hetrain.public.protocol.messages import (
    Blob,
    Completion,
    Direction,
    EvaluateTask,
    Header,
    PrepareTask,
    new_token,
    parse,
)
from hetrain.transport.channel import NO_HEADER, Reply, RowRange
from hetrain.transport.requests.state import evaluate_task, prepare_task

Handler = Callable[[EvaluateTask, memoryview], list[memoryview]]
Preparer = Callable[[PrepareTask, bytes], None]


class InProcessChannel:
    """Runs every request at once, in the thread that sends it, through the same messages as the queue's.

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
        task = parse(PrepareTask, task.to_json(), where="local channel")
        begun = perf_counter()
        if self._preparer is not None:
            self._preparer(task, plan)
        self._prepared = task
        return Completion(
            request=task.request, state="done", worker="local", device="local", seconds=perf_counter() - begun
        )

    def partition(self, group: str, n_rows: int, nbytes: int, step: int) -> list[RowRange]:
        """All rows at once; see `Channel.partition`."""
        return [(0, n_rows)]

    def send(
        self,
        group: str,
        direction: Direction,
        header: Header,
        payload: Sequence[memoryview],
        rows: Sequence[RowRange],
    ) -> InProcessPending:
        """See `Channel.send`."""
        if self._closed:
            raise Interrupted("the channel is closed")
        if self._prepared is None:
            raise UsageError("the channel must be prepared before something is sent")
        operand = memoryview(bytearray().join(payload))
        blob = Blob(job=self._job, kind="in", token=new_token(), nbytes=operand.nbytes)
        begun = perf_counter()
        parts: list[memoryview] = []
        try:
            for start, stop in rows:
                task = evaluate_task(
                    self._prepared, new_token(), group, direction, header, (start, stop), blob
                )
                task = parse(EvaluateTask, task.to_json(), where="local channel")
                parts.append(memoryview(bytearray().join(self._handler(task, operand))))
        except HetrainError as error:
            return InProcessPending(error)
        return InProcessPending(
            Reply(
                parts=parts,
                bytes_up=operand.nbytes,
                bytes_down=sum(part.nbytes for part in parts),
                server_s=perf_counter() - begun,
                device="local",
            )
        )

    def close(self) -> None:
        """See `Channel.close`."""
        self._closed = True


class InProcessPending:
    """A request that has already been run."""

    def __init__(self, outcome: Reply | HetrainError) -> None:
        self._outcome = outcome

    def result(self) -> Reply:
        """See `Pending.result`."""
        if isinstance(self._outcome, HetrainError):
            raise self._outcome
        return self._outcome
