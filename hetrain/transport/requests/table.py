"""A job's requests: their states, and the futures on which other threads wait. One thread's; no I/O."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import replace
from time import monotonic

from hetrain.public.errors import HetrainError, TaskFailed, WireError
from hetrain.public.protocol.messages import Completion, EvaluateTask
from hetrain.transport.requests.decision import (
    MOST_REJECTIONS,
    Decision,
    Done,
    Fail,
    Progress,
    Wait,
    decide,
    takers,
)
from hetrain.transport.requests.request import Timeouts
from hetrain.transport.requests.state import (
    ClientEvent,
    Event,
    Observation,
    Reason,
    RequestState,
    ResultRefused,
    excluding,
    observe,
)
from hetrain.transport.requests.strikes import Strikes
from hetrain.transport.scheduling.router import Router
from hetrain.transport.scheduling.throughput import work_of

logger = logging.getLogger(__name__)

Outcome = Future[Completion]
_STRIKES = frozenset({Reason.FAILED, Reason.RESULT_LOST, Reason.WORKER_LOST})


class RequestTable:
    """The states of a job's requests from `add` to `remove`. One thread calls its methods.

    Args:
        router: knows which workers serve a request, and counts the requests of each queue.
        timeouts: how long to wait for what.
    """

    def __init__(self, router: Router, timeouts: Timeouts) -> None:
        self._router = router
        self._timeouts = timeouts
        self._states: dict[str, RequestState] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._removed: list[RequestState] = []
        self._rejections: dict[str, HetrainError] = {}
        self._refusers: frozenset[str] = frozenset()
        self._strikes = Strikes()
        self.progress = Progress(monotonic())

    def add(self, state: RequestState, outcome: Outcome) -> None:
        """Takes a request that is being sent, and is counted on its queue."""
        self._states[state.request.id] = replace(
            state, rejections=dict(self._rejections), refused_by=self._refusers
        )
        self._outcomes[state.request.id] = outcome

    def count_sending(self, request: str) -> None:
        """Counts one more sending; changes nothing else, as the request may run, or have ended, already."""
        state = self._states[request]
        self._states[request] = replace(state, sends=state.sends + 1)

    def remove(self, ids: Iterable[str]) -> None:
        """Forgets requests; what still comes for them is thrown away."""
        for each in ids:
            state = self._states.pop(each, None)
            if state is None:
                continue
            self._removed.append(state)
            if state.completion is not None:  # its result was accepted
                self._strikes.forgive(state.completion.worker)
            if not self._outcomes.pop(each).done():
                self._router.count(state.queue, -1)

    def take_removed(self) -> list[RequestState]:
        """The states of the requests that were removed since the last call."""
        removed, self._removed = self._removed, []
        return removed

    def get(self, request: str) -> RequestState | None:
        """The state of a request that it has."""
        return self._states.get(request)

    def states(self) -> list[RequestState]:
        """The states of all requests."""
        return list(self._states.values())

    def pending(self) -> list[RequestState]:
        """The states of the requests without an outcome."""
        return [state for each, state in self._states.items() if not self._outcomes[each].done()]

    def observe(self, request: str, event: Event) -> Decision:
        """Notes an event about a request; see `settle`."""
        before, now = self._states[request], monotonic()
        self.progress = self.progress.after(before, event, now)
        after = self._states[request] = observe(before, event, now)
        if before.queue != after.queue:
            self._router.count(before.queue, -1)
            self._router.count(after.queue, 1)
        if before.completion is None and after.completion is not None:
            self._measure(after, after.completion)
        if event is Observation.BROKER_RESTARTED:
            self._strikes.forgive_all()
        elif after.due is not None and after.due is not before.due:
            self._judge(after, after.due, now)
        return self.settle(request)

    def reopen(self, request: str, event: ClientEvent, outcome: Outcome) -> Decision:
        """Notes that the client has lost or rejects the result of an ended request; see `settle`.

        A worker whose result was rejected is excluded from all requests.
        """
        if isinstance(event, ResultRefused):
            self._exclude(event.worker, event.error)
        self._outcomes[request] = outcome
        self._router.count(self._states[request].queue, 1)
        return self.observe(request, event)

    def settle(self, request: str) -> Decision:
        """Decides about a request, and sets its outcome if it is done or fails. Returns the decision."""
        state, outcome = self._states[request], self._outcomes[request]
        if outcome.done():
            return Wait()
        serving = self._router.serving(state.request, state.queue)
        decision = decide(state, serving, self.progress, monotonic(), self._timeouts)
        if isinstance(decision, Done):
            outcome.set_result(decision.completion)
        elif isinstance(decision, Fail):
            outcome.set_exception(self._error(state, decision.reason))
        else:
            return decision
        self._router.count(state.queue, -1)
        return decision

    def fail_all(self, error: HetrainError) -> None:
        """Sets the outcome of all requests that have none."""
        for outcome in self._outcomes.values():
            if not outcome.done():
                outcome.set_exception(error)

    def _exclude(self, worker: str, error: HetrainError) -> None:
        if worker not in self._rejections:
            logger.warning("no result of worker %s is accepted any more: %s", worker, error.what)
        self._rejections[worker] = error
        self._router.exclude(worker)
        for each, state in self._states.items():
            self._states[each] = excluding(state, worker, error)

    def _judge(self, state: RequestState, due: Reason, now: float) -> None:
        """Passes over the worker of `state`, while another one serves the request.

        That is, if nothing ends well by it, or if it refuses what it is registered to serve.
        """
        worker, serving = state.worker, self._router.serving(state.request, state.queue)
        if not worker or worker in self._rejections or not set(takers(state, serving)) - {worker}:
            return
        if due is Reason.REFUSED:
            if worker in serving and worker not in self._refusers:
                logger.warning("worker %s is passed over: %s", worker, state.error)
                self._refusers |= {worker}
                self._router.exclude(worker)
        elif due in _STRIKES and len(self._rejections) < MOST_REJECTIONS // 2:
            error = state.error or self._error(state, due)
            is_lie = isinstance(error, WireError)
            if is_lie or self._strikes.add(worker, now, at_once=due is Reason.FAILED):
                self._exclude(worker, error)

    def _measure(self, state: RequestState, completion: Completion) -> None:
        if isinstance(state.request.task, EvaluateTask):
            work = work_of(state.request.task)
            self._router.throughput.note(completion.worker, work, completion.seconds)

    def _error(self, state: RequestState, reason: Reason) -> HetrainError:
        """What `state` was reported with, else the error that `reason` stands for."""
        if state.error is not None:
            return state.error
        if reason is Reason.GROUP_UNSERVED:
            return self._router.not_served(self._router.coverage().missing, self._timeouts.no_worker_s)
        if reason is Reason.NO_WORKER:
            return self._router.no_worker(state.queue, self._timeouts.no_worker_s)
        if reason is Reason.RUN_LIMIT:
            what = f"the worker {state.worker} has not finished after {state.request.run_limit_s:.0f} s"
            hint = "see its log; use smaller micro-batches or more workers"
        else:
            what = f"the worker {state.worker} died while it ran this task, as {state.resends} others had"
            hint = "see the workers' logs; if they ran out of memory, use smaller micro-batches"
        return TaskFailed(what, where=str(state.request), hint=hint)
