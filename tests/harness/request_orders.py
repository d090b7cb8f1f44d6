"""One request through any order of events, with what must hold after each of them."""

from __future__ import annotations

from collections import Counter
from types import MappingProxyType

from hetrain.public.errors import BlobMissing, HetrainError, ResultRejected, TaskFailed, WorkerRefused
from hetrain.public.protocol.messages import Blob, Completion, EvaluateTask
from hetrain.transport.requests.decision import Decision, Done, Fail, Progress, Resend, Wait, decide, takers
from hetrain.transport.requests.request import Request, Timeouts
from hetrain.transport.requests.state import (
    COUNTED,
    ClientEvent,
    CompletionDamaged,
    Event,
    Failed,
    Finished,
    Observation,
    Reason,
    ResultLost,
    ResultRefused,
    Sent,
    Started,
    observe,
    sent,
)

WORKERS = ("a", "b", "c")
QUEUES = ("gpu", "gpu.0-0of2")
ERRORS = MappingProxyType({error: error("why") for error in (BlobMissing, WorkerRefused, TaskFailed)})
JUMPS_S = (0.1, 1.0, 3.5, 20.0, 61.0, 130.0, 700.0)
TIMEOUTS = Timeouts(attempts=2)
JOB, TOKEN = "0" * 32, "1" * 32
_BLOB = Blob(job=JOB, kind="in", token=TOKEN, nbytes=1)
_TASK = EvaluateTask(
    request=TOKEN,
    job=JOB,
    model="m",
    engine="clear",
    plan=_BLOB,
    plan_digest=TOKEN,
    group="g",
    direction="forward",
    start=0,
    stop=1,
    header={},
    input=_BLOB,
)
REQUEST = Request(_TASK, None, TIMEOUTS.run_s)
COMPLETIONS = {worker: Completion(request=TOKEN, state="done", worker=worker) for worker in WORKERS}


class RequestOrder:
    """A request, its surroundings, and a count of what was decided. Each method is one step."""

    def __init__(self) -> None:
        self.now = 100.0
        self.serving: dict[str, str] = {}
        self.progress = Progress(self.now)
        self.state = sent(REQUEST, QUEUES[0], self.now)
        self.decisions: Counter[Decision] = Counter()
        self.outcome: Done | Fail | None = None
        self._signs = [self.now]
        self._counted = self._revived = 0

    def pass_time(self, seconds: float) -> None:
        """Nothing happens for a while."""
        self.now += seconds
        self._check()

    def register(self, serving: dict[str, str]) -> None:
        """Other workers are registered, by name with their queue."""
        self.serving = serving
        self._check()

    def start_another(self, seconds: float) -> None:
        """A worker begins another request of the same queue, which was sent later."""
        self.progress = self.progress.after(sent(REQUEST, self.state.queue, self.now), Started("c"), self.now)
        self._signs.append(self.now)
        self.pass_time(seconds)

    def observe(self, event: Event) -> None:
        """An event comes from a worker, from the broker, or from the client."""
        before = self.state
        self.progress = self.progress.after(before, event, self.now)
        self.state = observe(before, event, self.now)
        if isinstance(event, Started | Finished | Failed) or event is Observation.LEASE_SEEN:
            self._signs.append(self.now)
        if before.completion is not None and not isinstance(event, ClientEvent):
            assert self.state is before, "an ended request has changed"
        if event is Observation.LEASE_SEEN and before.completion is None:
            self._revived += before.resends - self.state.resends
            assert isinstance(self._decide(), Wait) or self._has_run_too_long()
        if isinstance(event, Finished):
            is_accepted = event.completion.worker not in before.rejections
            assert (self.state.completion is not None) == (is_accepted or before.completion is not None)
        self._check()

    def tick(self, *, is_sent: bool) -> None:
        """The round that is made every second; sending may fail."""
        decision = self._decide()
        self.decisions[decision] += 1
        if isinstance(decision, Done | Fail):
            self.outcome = decision
            self._check_outcome(decision)
        elif isinstance(decision, Resend) and is_sent:
            self._send(decision.reason)

    def stay_silent(self) -> None:
        """No event comes any more: the request ends all the same, however far it had got."""
        for _ in range(40):
            if self.outcome is not None:
                return
            self.tick(is_sent=True)
            self.now += 50.0
        raise AssertionError(f"it waits for ever: {self.state}")

    def reopen(self, event: ClientEvent) -> None:
        """The client has lost or rejects the result."""
        assert isinstance(self.outcome, Done)
        self.outcome = None
        self.observe(event)
        assert self.state.completion is None

    def _send(self, reason: Reason) -> None:
        queues = sorted(takers(self.state, self.serving).values())
        before, queue = self.state, queues[0] if queues else self.state.queue
        self._counted += reason in COUNTED
        self.observe(Sent(queue))
        assert (self.state.sends, self.state.sent_at) == (before.sends + 1, self.now)
        assert self.state.due is None
        assert self._decide() in (Wait(), Resend(Reason.OVERTAKEN)) or isinstance(self._decide(), Fail)

    def _decide(self) -> Decision:
        return decide(self.state, self.serving, self.progress, self.now, TIMEOUTS)

    def _has_run_too_long(self) -> bool:
        return self.state.started_at is not None and self.now - self.state.started_at > REQUEST.run_limit_s

    def _check(self) -> None:
        state, decision = self.state, self._decide()
        assert isinstance(decision, Done) == (state.completion is not None)
        assert 0 <= state.resends <= TIMEOUTS.attempts
        assert state.resends == self._counted - self._revived
        assert state.asked_at <= state.sent_at <= self.now
        if state.completion is not None:
            assert state.completion.worker not in state.rejections
            return
        if state.due is None and state.started_at is not None and not self._has_run_too_long():
            assert decision == Wait(), "sent again although a worker runs it"
        later = self.now + max(REQUEST.run_limit_s, TIMEOUTS.deadline_s) + 1
        assert decide(state, self.serving, self.progress, later, TIMEOUTS) != Wait()

    def _check_outcome(self, outcome: Done | Fail) -> None:
        state = self.state
        if isinstance(outcome, Done):
            return
        if outcome.reason is Reason.NO_WORKER:
            assert self.now - max(self._signs) > TIMEOUTS.no_worker_s
            assert state.queue not in self.serving.values() or self.now - max(self._signs) > TIMEOUTS.run_s
        if outcome.reason in {Reason.RESULT_REJECTED, Reason.WORKER_EXCLUDED}:
            is_late = self.now - state.asked_at > REQUEST.run_limit_s
            is_counted = outcome.reason is Reason.RESULT_REJECTED
            is_exhausted = state.resends == TIMEOUTS.attempts if is_counted else is_late
            assert is_exhausted or not takers(state, self.serving)
            assert isinstance(state.error, ResultRejected | TaskFailed)
        if outcome.reason in COUNTED - {Reason.RESULT_REJECTED}:
            assert state.resends == TIMEOUTS.attempts
        if outcome.reason is Reason.RUN_LIMIT:
            assert self._has_run_too_long()
        assert outcome.reason not in {Reason.SILENCE, Reason.OVERTAKEN, Reason.MISROUTED, Reason.DEADLINE}


def rejected(worker: str) -> ResultRefused:
    """The client's check rejects what `worker` has answered."""
    return ResultRefused(worker, ResultRejected("wrong", where=worker))


def lost() -> ResultLost:
    """The client does not find the result."""
    return ResultLost(ERRORS[BlobMissing])


def failed(worker: str, error: type[HetrainError]) -> Failed:
    """A worker reports a failure."""
    return Failed(worker, ERRORS[error])


EVENTS: tuple[Event, ...] = (
    *(Started(worker) for worker in WORKERS),
    *(Finished(completion) for completion in COMPLETIONS.values()),
    *(failed(worker, error) for worker in WORKERS for error in ERRORS),
    *Observation,
    *[Observation.LEASE_MISSING] * 3,
    CompletionDamaged(ERRORS[BlobMissing]),
)
