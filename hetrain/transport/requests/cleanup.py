"""Deletes a job's Redis keys. Names are remembered, not listed, so a client needs no right to list keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hetrain.public.errors import WireError
from hetrain.public.protocol import keys
from hetrain.public.protocol.messages import Blob, Completion, EvaluateTask, parse
from hetrain.transport.requests.job_connection import JobConnection
from hetrain.transport.requests.state import RequestState, is_result

_NAMES_AT_ONCE = 1000


class JobKeys:
    """Deletes the keys of a job. Methods raise `BrokerError`; what they leave then expires."""

    def __init__(self, connection: JobConnection) -> None:
        self._connection = connection
        self._plans: list[Blob] = []
        self._ended: list[str] = []
        self._repeated: list[str] = []

    def note_plan(self, blob: Blob) -> None:
        """Remembers a plan, which is needed for as long as the job lasts."""
        self._plans.append(blob)

    def remove_blobs(self, requests: Sequence[str], operand: Blob) -> None:
        """Deletes the operand of requests that are given up, and those of their results that are there."""
        self._connection.store.delete([operand, *self._outputs(requests)])

    def forget(self, states: Iterable[RequestState]) -> None:
        """Deletes what is known about requests for which no thread waits any more.

        One that was sent more than once may still be queued: that it has ended stays written down.
        After an error the next call deletes what this one has left.
        """
        for state in states:
            (self._ended if state.sends == 1 else self._repeated).append(state.request.id)
        self._unlink(self._names(self._ended))
        self._ended = []

    def declare_dead(self) -> None:
        """Lets workers drop what is still queued, and keeps them from leaving more."""
        self._unlink([keys.alive(self._connection.job)])

    def remove_all(self, states: Sequence[RequestState]) -> None:
        """Deletes what there is of the job and its remaining requests."""
        tasks = [state.request.task for state in states]
        inputs = [task.input for task in tasks if isinstance(task, EvaluateTask)]
        ids = [task.request for task in tasks]
        self._connection.store.delete([*self._plans, *inputs, *self._outputs(ids)])
        ids += [*self._ended, *self._repeated]
        self._unlink([keys.done_list(self._connection.job), *self._names(ids)])

    def _names(self, requests: Sequence[str]) -> list[str]:
        job = self._connection.job
        return [
            kind(job, request) for request in requests for kind in (keys.finished, keys.tries, keys.lease)
        ]

    def _outputs(self, requests: Sequence[str]) -> list[Blob]:
        """Results that were finished and not collected."""
        if not requests:
            return []
        with self._connection.errors():
            found = self._connection.client.mget(
                [keys.finished(self._connection.job, request) for request in requests]
            )
        return [blob for message in found if message and (blob := self._output(message)) is not None]

    def _output(self, message: bytes) -> Blob | None:
        try:
            completion = parse(Completion, message, where="finished request")
        except WireError:
            return None
        return completion.output if is_result(completion, self._connection.job) else None

    def _unlink(self, names: Sequence[str]) -> None:
        for start in range(0, len(names), _NAMES_AT_ONCE):
            with self._connection.errors():
                self._connection.client.unlink(*names[start : start + _NAMES_AT_ONCE])
