"""The thread that owns a job's requests: it hears what workers report, and makes a round every second.

Other threads hand it what it shall do through a queue without locks, and wait on futures. It empties that
queue before it looks at any message, so it knows each request before the first report about it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic, sleep

from hetrain.public.errors import BrokerError, BrokerUnreachable, HetrainError, WireError
from hetrain.public.protocol import keys
from hetrain.public.protocol.messages import Completion, parse
from hetrain.transport.requests.cleanup import JobKeys
from hetrain.transport.requests.decision import Decision, Resend
from hetrain.transport.requests.job_connection import JobConnection
from hetrain.transport.requests.recovery import RecoveryLoop
from hetrain.transport.requests.request import Source
from hetrain.transport.requests.state import (
    ClientEvent,
    Reason,
    RequestState,
    event_of,
    is_result,
)
from hetrain.transport.requests.table import Outcome, RequestTable
from hetrain.transport.scheduling.router import Router

TICK_S = 1.0
_POP_COUNT = 64
_SENDS_AT_ONCE = 3
_AT_ONCE = frozenset({Reason.RESULT_REJECTED, Reason.FAILED})
_AT_ONCE_WHILE_EARLY = frozenset({Reason.WORKER_EXCLUDED, Reason.REFUSED})

logger = logging.getLogger(__name__)


class Collector:
    """Owns the requests of a job from `submit` to `forget`. Thread-safe.

    Args:
        connection: the job's link to its broker.
        router: chooses the requests' queues.
        job_keys: the job's keys in the broker.
        health_check: reports what became of processes that this client depends on, None while they are well.
    """

    def __init__(
        self,
        connection: JobConnection,
        router: Router,
        job_keys: JobKeys,
        health_check: Callable[[], HetrainError | None],
    ) -> None:
        self._connection = connection
        self._health_check = health_check
        self._table = RequestTable(router, connection.timeouts)
        self._recovery = RecoveryLoop(connection, router, self._table, job_keys)
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._ends: list[HetrainError] = []
        self._thread = threading.Thread(target=self._run, name="hetrain-collector", daemon=True)

    def start(self) -> None:
        """Declares the job alive and starts the thread. Raises `BrokerError`."""
        self._recovery.start()
        self._thread.start()

    def keep(self, plan: Source) -> None:
        """Keeps the job's plan in the broker from now on."""
        self._recovery.keep(plan)

    def submit(self, state: RequestState) -> Outcome:
        """Takes a request that will be sent next. Raises what ended the thread, if something has."""
        return self._command(partial(self._table.add, state))

    def reopen(self, request: str, event: ClientEvent) -> Outcome:
        """Has a request run again whose result was lost or rejected. Raises as `submit`."""
        outcome = self._command(partial(self._reopen, request, event))
        self._wake()
        return outcome

    def count_sending(self, request: str) -> None:
        """Counts one more sending of a request: of an earlier one it is not known whether it succeeded."""
        self._commands.put(partial(self._table.count_sending, request))

    def forget(self, requests: Iterable[str]) -> None:
        """Forgets requests; what still comes for them is thrown away."""
        self._commands.put(partial(self._table.remove, list(requests)))

    def check(self) -> None:
        """Raises what ended the thread, if something has."""
        if self._ends:
            raise self._ends[0]

    def stop(self, reason: HetrainError) -> None:
        """Ends all requests with `reason`, and the thread. Only the first reason counts."""
        self._ends.append(reason)
        self._wake()

    def join(self, timeout_s: float) -> list[RequestState]:
        """Waits for the thread's end. Returns the requests whose keys may be left."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return [*self._table.states(), *self._table.take_removed()]

    def _command(self, action: Callable[[Outcome], None]) -> Outcome:
        outcome: Outcome = Future()
        self._commands.put(partial(action, outcome))
        self.check()  # afterwards: a thread that ends from now on still finds the order
        return outcome

    def _wake(self) -> None:
        """Has the thread look at its orders now."""
        done_list = keys.done_list(self._connection.job)
        with suppress(BrokerError), self._connection.errors():
            pipe = self._connection.client.pipeline(transaction=True)
            pipe.rpush(done_list, "")
            pipe.expire(done_list, keys.DONE_TTL_S)
            pipe.execute()

    def _run(self) -> None:
        """What the thread does. However it ends, no thread is left waiting."""
        try:
            self._serve()
        except HetrainError as error:
            self._ends.append(error)
        except BaseException as error:
            logger.exception("the collector failed")
            failure = BrokerError(
                f"the thread that receives results failed ({type(error).__name__}: {error})"
            )
            failure.__cause__ = error
            self._ends.append(failure)
        finally:
            self._run_commands()
            self._table.fail_all(self._ends[0])

    def _serve(self) -> None:
        heard_at, next_round = monotonic(), 0.0
        while not self._ends:
            if error := self._health_check():
                raise error
            try:
                messages = self._pop()
                self._run_commands()
                for message in messages:
                    self._handle(message)
                if monotonic() >= next_round:
                    next_round = monotonic() + TICK_S
                    self._recovery.tick()
                heard_at = monotonic()
            except BrokerUnreachable:
                if monotonic() - heard_at > self._connection.timeouts.outage_s:
                    raise
                self._recovery.restart_waits()  # an outage is not the workers' fault
                sleep(TICK_S / 2)

    def _pop(self) -> list[bytes]:
        done_list = keys.done_list(self._connection.job)
        with self._connection.errors():
            popped = self._connection.client.blmpop(TICK_S, 1, done_list, direction="LEFT", count=_POP_COUNT)
        return popped[1] if popped else []

    def _run_commands(self) -> None:
        with suppress(Empty):
            while True:
                self._commands.get_nowait()()

    def _reopen(self, request: str, event: ClientEvent, outcome: Outcome) -> None:
        self._resend_if_rejected(request, self._table.reopen(request, event, outcome))

    def _handle(self, message: bytes) -> None:
        if not message:
            return  # from `_wake`
        try:
            completion = parse(Completion, message, where="done-list")
        except WireError as error:
            logger.warning("ignored a message: %s", error)
            return
        state = self._table.get(completion.request)
        if state is None or completion.worker in state.rejections:
            self._throw_away(completion)
        if state is None:
            return
        self._recovery.restart_waits()
        event = event_of(completion, state.request)
        self._resend_if_rejected(completion.request, self._table.observe(completion.request, event))

    def _resend_if_rejected(self, request: str, decision: Decision) -> None:
        """Sends what was rejected or has failed again now: a worker that waits already gets it first.

        What an excluded worker or one that does not serve it answers waits for the next round from its third
        sending on: no other is free.
        """
        if not isinstance(decision, Resend) or self._ends:
            return
        state, reason = self._table.get(request), decision.reason
        is_early = state is not None and state.sends < _SENDS_AT_ONCE
        if reason in _AT_ONCE or (reason in _AT_ONCE_WHILE_EARLY and is_early):
            with suppress(BrokerError):  # the next round tries again
                self._recovery.send_again(request, reason)

    def _throw_away(self, completion: Completion) -> None:
        """Deletes a result that no thread waits for."""
        if completion.output is not None and is_result(completion, self._connection.job):
            with suppress(BrokerError):  # it expires
                self._connection.store.delete([completion.output])
