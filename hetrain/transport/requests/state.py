"""What is known about a request that is on its way, and how an event changes it. Pure functions.

A state is *ended* once its completion is known. From then on only the client itself changes it: when it has
lost the result, or rejects it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from hetrain.public.errors import BlobMissing, HetrainError, WireError, WorkerRefused
from hetrain.public.protocol import keys
from hetrain.public.protocol.messages import Completion, EvaluateTask
from hetrain.transport.requests.remote_errors import error_of
from hetrain.transport.requests.request import Request, Timeouts

LOOKS_UNTIL_LOST = 2
SILENCE_S = 3.0
OVERTAKEN_S = 1.0
_DEFAULT = Timeouts()


class Reason(Enum):
    """Why a request is sent again, or fails: what is observed. What is done then: docs/architecture.md."""

    BROKER_RESTARTED = "the broker has forgotten the job (`alive` is gone)"
    BROKER_FULL = (
        "it waits, and the broker has no memory for as much as a task takes: a worker may have given it up"
    )
    QUEUE_LOST_WORKER = (
        "it waits, and a worker of its queue has left: its registration lapsed or was withdrawn"
    )
    MISROUTED = "it waits, and no worker of its queue serves it, while another queue's workers do"
    OVERTAKEN = (
        "it waits, and its queue, first in, first out, has handed out a request that was sent, for the first "
        f"time, more than {OVERTAKEN_S:.0f} s after it (times the number of its own sendings)"
    )
    SILENCE = f"it waits, and no worker has given a sign for {SILENCE_S:.0f} s; then for 6, 12, 20, 20, … s"
    DEADLINE = f"it waits for {_DEFAULT.deadline_s:.0f} s, while others are run"
    WORKER_LOST = (
        f"a worker began it; its lease is gone and there is no completion, in {LOOKS_UNTIL_LOST} looks"
    )
    INPUT_LOST = "a worker reports `BlobMissing`"
    RESULT_LOST = (
        "it is done, and its result is gone from the broker, or what is kept of its completion is damaged"
    )
    RESULT_REJECTED = (
        "the client's check rejects the result, or it has another size than it can have; its worker is named"
    )
    WORKER_EXCLUDED = "a worker answers that has failed at it, or of which the client has rejected a result"
    REFUSED = "a worker reports `WorkerRefused`"
    FAILED = "a worker reports any other failure, or a result that is not the request's"
    RUN_LIMIT = (
        f"a worker holds its lease, and has not finished after {_DEFAULT.run_s:.0f} s "
        f"({_DEFAULT.prepare_s:.0f} s to prepare)"
    )
    NO_WORKER = (
        f"it waits, and no worker has given a sign for {_DEFAULT.no_worker_s:.0f} s; where one is registered "
        f"to serve it, and so is busy with others' requests, for {_DEFAULT.run_s:.0f} s"
    )
    GROUP_UNSERVED = (
        f"for {_DEFAULT.no_worker_s:.0f} s no registered worker has served its group, while others are served"
    )


COUNTED = frozenset({Reason.WORKER_LOST, Reason.INPUT_LOST, Reason.RESULT_LOST, Reason.RESULT_REJECTED})
"""What `Timeouts.attempts` bounds."""


@dataclass(frozen=True)
class Sent:
    """It was put on a queue again."""

    queue: str


@dataclass(frozen=True)
class Started:
    """A worker reports that it has begun."""

    worker: str


@dataclass(frozen=True)
class Finished:
    """A worker reports its completion, which is this request's own."""

    completion: Completion


@dataclass(frozen=True)
class Failed:
    """A worker reports a failure."""

    worker: str
    error: HetrainError


class Observation(Enum):
    """What a look at the broker shows."""

    LEASE_SEEN = "a living worker's lease"
    LEASE_MISSING = "neither a lease nor a completion"
    GROUP_SERVED = "a registered worker serves its group"
    GROUP_UNSERVED = "no registered worker serves its group, while other groups are served"
    QUEUE_LOST_WORKER = "a worker of its queue has left"
    BROKER_FULL = "the broker has no memory for as much as a task takes"
    BROKER_RESTARTED = "the broker has lost all that it knew of the job"


@dataclass(frozen=True)
class CompletionDamaged:
    """A look at the broker shows a completion that cannot be read: whoever damaged it is not known."""

    error: HetrainError


@dataclass(frozen=True)
class ResultLost:
    """The client could not download the result."""

    error: HetrainError


@dataclass(frozen=True)
class ResultRefused:
    """The client's check rejects the result of a worker."""

    worker: str
    error: HetrainError


WorkerEvent = Started | Finished | Failed
ClientEvent = ResultLost | ResultRefused
Event = WorkerEvent | ClientEvent | Observation | CompletionDamaged | Sent


@dataclass(frozen=True)
class RequestState:
    """What is known about a request. Times are seconds of the monotonic clock.

    Attributes:
        request: what is asked.
        queue: where it was sent last.
        asked_at: when it was sent first.
        sent_at: when it was sent last.
        sends: how often it was sent.
        resends: how often it was sent again for a reason in `COUNTED`.
        resent_for: why it was sent last, None the first time.
        started_at: when a worker began what was sent last, None before.
        worker: the last one that reported something.
        missed_looks: how many looks in a row found its worker gone.
        unserved_at: since when no registered worker has served its group, None while one does.
        refused_on: queues of workers that do not serve it.
        refused_by: those workers.
        rejections: why a worker is not asked again, by its name: its result was rejected, or it failed.
        due: why it must be sent again, or fail.
        error: what `due` was reported with, if it was.
        completion: of what was sent last.
    """

    request: Request
    queue: str
    asked_at: float
    sent_at: float
    sends: int = 1
    resends: int = 0
    resent_for: Reason | None = None
    started_at: float | None = None
    worker: str = ""
    missed_looks: int = 0
    unserved_at: float | None = None
    refused_on: frozenset[str] = frozenset()
    refused_by: frozenset[str] = frozenset()
    rejections: Mapping[str, HetrainError] = field(default_factory=dict)
    due: Reason | None = None
    error: HetrainError | None = None
    completion: Completion | None = None


def sent(request: Request, queue: str, now: float) -> RequestState:
    """The state of a request that is being sent for the first time."""
    return RequestState(request, queue, asked_at=now, sent_at=now)


def observe(state: RequestState, event: Event, now: float) -> RequestState:
    """The state after `event`, which was observed at `now`."""
    if state.completion is not None:
        return _reopened(state, event) if isinstance(event, ClientEvent) else state
    match event:
        case Sent(queue):
            return _sent_again(state, queue, now)
        case Started(worker):
            return replace(state, started_at=now, worker=worker, missed_looks=0)
        case Finished(Completion(worker=worker)) | Failed(worker) if worker in state.rejections:
            return _due(state, Reason.WORKER_EXCLUDED, state.rejections[worker])
        case Finished(completion):
            return replace(state, completion=completion, worker=completion.worker, due=None, error=None)
        case Failed(worker, error):
            return _failed(replace(state, worker=worker), error)
        case CompletionDamaged() if state.worker in state.rejections:
            return _due(state, Reason.WORKER_EXCLUDED, state.rejections[state.worker])
        case CompletionDamaged(error):
            return _due(state, Reason.RESULT_LOST, error)
        case Observation.LEASE_SEEN:
            return _alive(state, now)
        case Observation.LEASE_MISSING:
            return _missed(state)
        case Observation.GROUP_SERVED:
            return replace(state, unserved_at=None)
        case Observation.GROUP_UNSERVED:
            return state if state.unserved_at is not None else replace(state, unserved_at=now)
        case Observation.BROKER_RESTARTED:
            return _due(state, Reason.BROKER_RESTARTED)
        case Observation.QUEUE_LOST_WORKER | Observation.BROKER_FULL if state.started_at is None:
            return _due(state, Reason[event.name])
    return state


def excluding(state: RequestState, worker: str, error: HetrainError) -> RequestState:
    """The state once `worker` failed or gave a wrong result: what it reports does not end the request."""
    return replace(state, rejections={**state.rejections, worker: error})


def event_of(completion: Completion, request: Request) -> WorkerEvent:
    """What a worker's message says about `request`, to which it is addressed, or under which it was kept."""
    if completion.request != request.id:
        error = WireError("a worker reported another request in its place", where=str(request))
        return Failed(completion.worker, error)
    if completion.state == "started":
        return Started(completion.worker)
    if completion.state == "failed" and completion.failure is not None:
        return Failed(completion.worker, error_of(completion.failure, completion.worker))
    if completion.state == "failed":
        error = WireError("a worker reported a failure without saying which", where=str(request))
        return Failed(completion.worker, error)
    has_output = is_result(completion, request.task.job)
    if has_output if isinstance(request.task, EvaluateTask) else completion.output is None:
        return Finished(completion)
    error = WireError("a worker reported a result that is not this request's", where=str(request))
    return Failed(completion.worker, error)


def is_result(completion: Completion, job: str) -> bool:
    """Whether `completion` brings the result of the request that it names."""
    output = completion.output
    return output is not None and (output.job, output.kind, output.token) == (
        job,
        "out",
        keys.output_token(completion.request, completion.worker),
    )


def _due(state: RequestState, reason: Reason, error: HetrainError | None = None) -> RequestState:
    """What a worker or the client reports replaces a reason; what is merely looked up does not."""
    if state.due is not None and error is None:
        return state
    return replace(state, due=reason, error=error)


def _reopened(state: RequestState, event: ClientEvent) -> RequestState:
    state = replace(state, completion=None, started_at=None, missed_looks=0)
    if isinstance(event, ResultLost):
        return _due(state, Reason.RESULT_LOST, event.error)
    return _due(excluding(state, event.worker, event.error), Reason.RESULT_REJECTED, event.error)


def _sent_again(state: RequestState, queue: str, now: float) -> RequestState:
    return replace(
        state,
        queue=queue,
        sent_at=now,
        sends=state.sends + 1,
        resends=state.resends + (state.due in COUNTED),
        resent_for=state.due,
        started_at=None,
        missed_looks=0,
        due=None,
        error=None,
    )


def _failed(state: RequestState, error: HetrainError) -> RequestState:
    if isinstance(error, BlobMissing):
        return _due(state, Reason.INPUT_LOST, error)
    if isinstance(error, WorkerRefused):
        refused_on, refused_by = state.refused_on | {state.queue}, state.refused_by | {state.worker}
        return _due(replace(state, refused_on=refused_on, refused_by=refused_by), Reason.REFUSED, error)
    return _due(excluding(state, state.worker, error), Reason.FAILED, error)


def _alive(state: RequestState, now: float) -> RequestState:
    """A copy of it is being run, so no other one is needed."""
    state = replace(state, missed_looks=0, due=None, error=None)
    if state.started_at is not None:
        return state
    was_alive = state.resent_for is Reason.WORKER_LOST  # the worker that was taken for dead
    return replace(
        state,
        started_at=now,
        worker=state.worker or "unknown",
        resends=max(state.resends - was_alive, 0),
        resent_for=None,
    )


def _missed(state: RequestState) -> RequestState:
    # A failure that was reported since the last look at the done-list looks the same, once.
    if state.started_at is None or state.due is not None:
        return state
    state = replace(state, missed_looks=state.missed_looks + 1)
    if state.missed_looks < LOOKS_UNTIL_LOST:
        return state
    if state.worker in state.rejections:
        return _due(state, Reason.WORKER_EXCLUDED, state.rejections[state.worker])
    return _due(state, Reason.WORKER_LOST)
