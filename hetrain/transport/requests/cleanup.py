"""What a job leaves in the broker, remembered by name: a client need not see, let alone list, others'."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hetrain.public.errors import WireError
from hetrain.public.protocol import keys
from hetrain.public.protocol.messages import Blob, Completion, EvaluateTask, parse
from hetrain.transport.requests.job_connection import JobConnection
from hetrain.transport.requests.state import Request

_NAMES_AT_ONCE = 1000


class JobKeys:
    """Removes the keys of a job. Thread-safe. Methods raise `BrokerError`; what they leave then expires."""

    def __init__(self, connection: JobConnection) -> None:
        self._connection = connection
        self._plans: list[Blob] = []
        self._repeated: list[str] = []

    def note_plan(self, blob: Blob) -> None:
        """Remembers a plan, which is needed for as long as the job lasts."""
        self._plans.append(blob)

    def remove(self, requests: Sequence[Request], operands: Sequence[Blob]) -> None:
        """Removes what there is of `requests` that nobody waits for any more, their results, and `operands`.

        A request that was sent more than once may still be queued: that it has ended stays written down.
        """
        once: list[str] = []
        for request in requests:
            (once if request.sends <= 1 else self._repeated).append(request.id)
        outputs = [request.output for request in requests if request.output is not None]
        given_up = [
            request.id for request in requests if request.output is None and request.source is not None
        ]
        if given_up:
            outputs += self._outputs(given_up)
        self._unlink(self._names(once))
        self._connection.store.delete([*operands, *outputs])

    def declare_dead(self) -> None:
        """Lets workers drop what is still queued, and keeps them from leaving more."""
        self._unlink([keys.alive(self._connection.job)])

    def remove_all(self, remaining: Iterable[Request]) -> None:
        """Removes what there is of the job and its `remaining` requests."""
        tasks = [request.task for request in remaining]
        inputs = [task.input for task in tasks if isinstance(task, EvaluateTask)]
        ids = [task.request for task in tasks]
        self._connection.store.delete([*self._plans, *inputs, *self._outputs(ids)])
        self._unlink([keys.done_list(self._connection.job), *self._names([*ids, *self._repeated])])

    def _names(self, requests: Sequence[str]) -> list[str]:
        job = self._connection.job
        return [
            kind(job, request) for request in requests for kind in (keys.finished, keys.tries, keys.lease)
        ]

    def _outputs(self, requests: Sequence[str]) -> list[Blob]:
        """Results that were finished and not collected."""
        job = self._connection.job
        with self._connection.errors():
            pipe = self._connection.client.pipeline(transaction=False)
            for request in requests:
                pipe.get(keys.finished(job, request))
            found = pipe.execute()
        blobs = []
        for request, message in zip(requests, found, strict=True):
            output = _output(message) if message else None
            if output is not None and (output.job, output.kind) == (job, "out"):
                blobs.append(output.model_copy(update={"token": keys.output_token(request)}))
        return blobs

    def _unlink(self, names: Sequence[str]) -> None:
        for start in range(0, len(names), _NAMES_AT_ONCE):
            with self._connection.errors():
                self._connection.client.unlink(*names[start : start + _NAMES_AT_ONCE])


def _output(message: bytes) -> Blob | None:
    try:
        return parse(Completion, message, where="finished request").output
    except WireError:
        return None
