"""What is to be done about a request: wait, send it again, fail, or return its completion. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hetrain.public.protocol.messages import Completion
from hetrain.transport.requests.request import Timeouts
from hetrain.transport.requests.state import (
    COUNTED,
    OVERTAKEN_S,
    SILENCE_S,
    Event,
    Failed,
    Finished,
    Observation,
    Reason,
    RequestState,
    Started,
)

MOST_REJECTIONS = 8
"""Workers of which a job rejects results, or that fail at one request, before it ends.

Their names are their own choice, so that excluding names bounds nothing: this bounds how many wrong results,
and guesses of a `concrete` key, can be tried.
"""
_SHARE_UNTIL_RESENT = 1 / 3


@dataclass(frozen=True)
class Wait:
    """Nothing, for now."""


@dataclass(frozen=True)
class Resend:
    """Send it again."""

    reason: Reason


@dataclass(frozen=True)
class Fail:
    """End it with an error: the one that was reported, else the one that the reason stands for."""

    reason: Reason


@dataclass(frozen=True)
class Done:
    """End it with its completion."""

    completion: Completion


Decision = Wait | Resend | Fail | Done


@dataclass(frozen=True)
class Progress:
    """How a job's requests get on.

    Attributes:
        at: when a worker last gave a sign: a message of any kind, or a lease.
        handed_out: by queue, when the youngest of its begun requests was sent. A request that was sent more
            than once does not count: it may be the first copy that was begun.
    """

    at: float
    handed_out: Mapping[str, float] = field(default_factory=dict)

    def after(self, state: RequestState, event: Event, now: float) -> Progress:
        """The progress after `event` about a request in `state`."""
        if event is not Observation.LEASE_SEEN and not isinstance(event, Started | Finished | Failed):
            return self
        if not isinstance(event, Started) or state.sends > 1:
            return replace(self, at=now)
        latest = max(self.handed_out.get(state.queue, 0.0), state.sent_at)
        return Progress(now, {**self.handed_out, state.queue: latest})


def decide(
    state: RequestState, serving: Mapping[str, str], progress: Progress, now: float, timeouts: Timeouts
) -> Decision:
    """What is to be done about a request.

    Args:
        state: what is known about it.
        serving: the workers that are registered to serve it, and the queues from which they take.
        progress: of all of the job's requests.
        now: the time.
        timeouts: how long to wait for what.
    """
    if state.completion is not None:
        return Done(state.completion)
    if state.due is not None:
        is_final = _is_final(state, state.due, serving, now, timeouts)
        return Fail(state.due) if is_final else Resend(state.due)
    if state.started_at is not None:
        return Fail(Reason.RUN_LIMIT) if now - state.started_at > state.request.run_limit_s else Wait()
    return _decide_waiting(state, serving, progress, now, timeouts)


def takers(state: RequestState, serving: Mapping[str, str]) -> dict[str, str]:
    """Of `serving` the workers that have neither failed, nor refused, nor given a wrong result."""
    passed_over = state.refused_by.union(state.rejections)
    return {worker: queue for worker, queue in serving.items() if worker not in passed_over}


def _is_final(
    state: RequestState, due: Reason, serving: Mapping[str, str], now: float, timeouts: Timeouts
) -> bool:
    """Whether a request that is due fails instead of being sent again."""
    is_late = now - state.asked_at > state.request.run_limit_s
    if due is Reason.REFUSED:
        return is_late or not takers(state, serving)
    if due is Reason.WORKER_EXCLUDED:
        return is_late or not takers(state, serving)
    if due in (Reason.RESULT_REJECTED, Reason.FAILED) and (
        len(state.rejections) >= MOST_REJECTIONS or not takers(state, serving)
    ):
        return True
    return due in COUNTED and state.resends >= timeouts.attempts


def _decide_waiting(
    state: RequestState, serving: Mapping[str, str], progress: Progress, now: float, timeouts: Timeouts
) -> Decision:
    """What is to be done about a request that no worker has begun, as far as is known.

    A worker may have died before it could report that it had begun. A second copy does no harm.
    """
    queues = set(takers(state, serving).values())
    if queues and state.queue not in queues:
        return Resend(Reason.MISROUTED)
    # A worker that is registered to serve it is busy with other jobs.
    longest = state.request.run_limit_s if state.queue in serving.values() else timeouts.no_worker_s
    if state.unserved_at is not None:
        if now - state.unserved_at > timeouts.no_worker_s:
            return Fail(Reason.GROUP_UNSERVED)
    elif now - max(state.asked_at, progress.at) > longest:
        return Fail(Reason.NO_WORKER)
    if now - state.sent_at > timeouts.deadline_s:
        return Resend(Reason.DEADLINE)
    if now - max(state.sent_at, progress.at) > _longest_silence(state, timeouts):
        return Resend(Reason.SILENCE)
    if progress.handed_out.get(state.queue, 0.0) > state.sent_at + OVERTAKEN_S * state.sends:
        return Resend(Reason.OVERTAKEN)
    return Wait()


def _longest_silence(state: RequestState, timeouts: Timeouts) -> float:
    """Seconds without a sign of any worker until it is sent again: twice as many after each time."""
    doubled = SILENCE_S * 2.0 ** min(state.sends - 1, 10)
    return float(min(doubled, timeouts.no_worker_s * _SHARE_UNTIL_RESENT))
