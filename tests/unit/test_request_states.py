"""Requests under every order of events (a hypothesis state machine), and the rules one by one."""

from __future__ import annotations

import re
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hetrain.public.errors import BlobMissing, ResultRejected, TaskFailed, WireError, WorkerRefused
from hetrain.public.protocol import keys
from hetrain.public.protocol.messages import Blob, Completion, Failure
from hetrain.transport.requests.decision import (
    MOST_REJECTIONS,
    Decision,
    Done,
    Fail,
    Progress,
    Resend,
    Wait,
    decide,
)
from hetrain.transport.requests.state import (
    CompletionDamaged,
    Event,
    Failed,
    Finished,
    Observation,
    Reason,
    RequestState,
    Sent,
    Started,
    event_of,
    excluding,
    observe,
    sent,
)
from hetrain.transport.requests.strikes import Strikes
from tests.harness.request_orders import (
    COMPLETIONS,
    EVENTS,
    JOB,
    JUMPS_S,
    QUEUES,
    REQUEST,
    TIMEOUTS,
    TOKEN,
    WORKERS,
    RequestOrder,
    failed,
    lost,
    rejected,
)

DOCS = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"


class AnyOrder(RuleBasedStateMachine):
    """Hypothesis chooses the steps of a `RequestOrder`."""

    def __init__(self) -> None:
        super().__init__()
        self.order = RequestOrder()

    @precondition(lambda self: self.order.outcome is None)
    @rule(event=st.sampled_from(EVENTS))
    def observe(self, event: Event) -> None:
        self.order.observe(event)

    @precondition(lambda self: self.order.outcome is None)
    @rule(is_sent=st.booleans())
    def tick(self, is_sent: bool) -> None:
        self.order.tick(is_sent=is_sent)

    @precondition(lambda self: self.order.outcome is None)
    @rule(seconds=st.sampled_from(JUMPS_S), starts=st.booleans())
    def wait(self, seconds: float, starts: bool) -> None:
        (self.order.start_another if starts else self.order.pass_time)(seconds)

    @precondition(lambda self: self.order.outcome is None)
    @rule(serving=st.dictionaries(st.sampled_from(WORKERS), st.sampled_from(QUEUES)))
    def register(self, serving: dict[str, str]) -> None:
        self.order.register(serving)

    @precondition(lambda self: isinstance(self.order.outcome, Done))
    @rule(is_lost=st.booleans())
    def reopen(self, is_lost: bool) -> None:
        completion = self.order.state.completion
        assert completion is not None
        self.order.reopen(lost() if is_lost else rejected(completion.worker))

    @precondition(lambda self: self.order.outcome is not None)
    @rule()
    def end(self) -> None:
        """An order that has ended has no other steps."""

    @invariant()
    def has_a_state(self) -> None:
        assert self.order.state.request is REQUEST

    def teardown(self) -> None:
        if self.order.outcome is None:
            self.order.stay_silent()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=300, stateful_step_count=25, deadline=None)


def after(*events: Event, state: RequestState | None = None, now: float = 0.0) -> RequestState:
    state = sent(REQUEST, "gpu", 0.0) if state is None else state
    for event in events:
        state = observe(state, event, now)
    return state


def decided(
    state: RequestState,
    now: float = 0.0,
    serving: dict[str, str] | None = None,
    sign_at: float = 0.0,
    **taken: float,
) -> Decision:
    return decide(
        state, {"a": "gpu"} if serving is None else serving, Progress(sign_at, taken), now, TIMEOUTS
    )


def test_a_waiting_request_is_sent_again_after_silence_when_overtaken_and_at_its_deadline() -> None:
    waiting = after()
    assert decided(waiting, 3.0) == Wait()
    assert decided(waiting, 3.1) == Resend(Reason.SILENCE)
    assert decided(waiting, 100.0, sign_at=99.0) == Wait()
    assert decided(waiting, 120.1, sign_at=120.0) == Resend(Reason.DEADLINE)
    for sends, silence in ((2, 6.0), (3, 12.0), (4, 20.0), (9, 20.0)):
        state = after(*[Sent("gpu")] * (sends - 1))
        assert (decided(state, silence), decided(state, silence + 0.1)) == (Wait(), Resend(Reason.SILENCE))
    assert [decided(waiting, 2.0, sign_at=2.0, gpu=at) for at in (1.0, 1.1)] == [
        Wait(),
        Resend(Reason.OVERTAKEN),
    ]
    assert decided(after(Sent("gpu")), 2.1, sign_at=2.1, gpu=2.0) == Wait(), "2 s for a second copy"
    assert decided(waiting, 2.0, sign_at=2.0, other=2.0) == Wait()


def test_a_waiting_request_follows_the_registered_workers() -> None:
    waiting = after()
    assert decided(waiting, serving={"a": "gpu.0-0of2"}) == Resend(Reason.MISROUTED)
    assert decided(waiting, serving={"a": "gpu.0-0of2", "b": "gpu"}) == Wait()
    assert decided(after(Observation.QUEUE_LOST_WORKER)) == Resend(Reason.QUEUE_LOST_WORKER)
    assert decided(after(Observation.BROKER_FULL)) == Resend(Reason.BROKER_FULL)
    assert decided(after(Started("a"), Observation.QUEUE_LOST_WORKER, Observation.BROKER_FULL)) == Wait()
    assert decided(after(Started("a"), Observation.BROKER_RESTARTED)) == Resend(Reason.BROKER_RESTARTED)


def test_no_worker_is_reported_after_a_minute_and_a_busy_one_is_waited_for() -> None:
    waiting = after(*[Sent("gpu")] * 9, now=59.0)
    assert decided(waiting, 60.0, serving={}) == Wait()
    assert decided(waiting, 60.1, serving={}) == Fail(Reason.NO_WORKER)
    assert decided(waiting, 61.0) == Wait()
    assert decided(waiting, 600.1) == Fail(Reason.NO_WORKER)
    unserved = after(Observation.GROUP_UNSERVED, now=1.0)
    assert decided(unserved, 61.1, serving={}, sign_at=61.0) == Fail(Reason.GROUP_UNSERVED)
    assert after(Observation.GROUP_UNSERVED, Observation.GROUP_SERVED).unserved_at is None


def test_a_lease_tells_whether_a_request_runs() -> None:
    running = after(Started("a"))
    assert decided(running, 600.0) == Wait()
    assert decided(running, 600.1) == Fail(Reason.RUN_LIMIT)
    assert decided(after(Observation.LEASE_MISSING, state=running)) == Wait()
    assert (
        decided(
            after(Observation.LEASE_MISSING, Observation.LEASE_SEEN, Observation.LEASE_MISSING, state=running)
        )
        == Wait()
    )
    gone = after(Observation.LEASE_MISSING, Observation.LEASE_MISSING, state=running)
    assert decided(gone) == Resend(Reason.WORKER_LOST)
    again = after(Sent("gpu"), state=gone)
    assert (again.resends, again.started_at) == (1, None)
    # The worker that was taken for dead is not.
    assert after(Observation.LEASE_SEEN, state=again).resends == 0
    assert decided(after(Observation.LEASE_SEEN, state=again)) == Wait()
    for _ in range(TIMEOUTS.attempts):
        running = after(
            Observation.LEASE_MISSING, Observation.LEASE_MISSING, Sent("gpu"), Started("b"), state=running
        )
    assert decided(after(Observation.LEASE_MISSING, Observation.LEASE_MISSING, state=running)) == Fail(
        Reason.WORKER_LOST
    )


def test_workers_failures_end_a_request_or_send_it_again() -> None:
    alone = after(failed("a", TaskFailed))
    assert decided(alone) == Fail(Reason.FAILED), "no other worker serves it"
    assert decided(alone, serving={"a": "gpu", "b": "gpu"}) == Resend(Reason.FAILED)
    again = after(Sent("gpu"), failed("b", TaskFailed), state=alone)
    assert decided(again, serving={"a": "gpu", "b": "gpu"}) == Fail(Reason.FAILED), "both have failed"
    assert decided(after(failed("a", BlobMissing))) == Resend(Reason.INPUT_LOST)
    refused = after(failed("b", WorkerRefused))
    assert decided(refused) == Resend(Reason.REFUSED), "b is not registered to serve it"
    assert decided(refused, 600.1) == Fail(Reason.REFUSED)
    assert [decided(refused, serving=serving) for serving in ({}, {"b": "gpu"})] == [Fail(Reason.REFUSED)] * 2
    assert refused.refused_on == {"gpu"}
    both = {"a": "gpu", "b": "gpu"}
    assert decided(refused, serving=both) == Resend(Reason.REFUSED), "it has other weights than another one"
    assert decided(after(Sent("gpu"), failed("a", WorkerRefused), state=refused), serving=both) == Fail(
        Reason.REFUSED
    )


def test_a_damaged_completion_is_a_lost_result_and_no_lie() -> None:
    damaged = CompletionDamaged(BlobMissing("damaged"))
    state = after(Started("a"), damaged)
    assert decided(state) == Resend(Reason.RESULT_LOST), "though no other worker serves it"
    assert (state.rejections, state.error) == ({}, damaged.error)
    assert decided(after(Finished(COMPLETIONS["a"]), state=state)) == Done(COMPLETIONS["a"])
    for _ in range(TIMEOUTS.attempts):
        state = after(Sent("gpu"), Started("a"), damaged, state=state)
    assert decided(state) == Fail(Reason.RESULT_LOST)
    excluded = excluding(after(Started("a")), "a", ResultRejected("wrong"))
    assert after(damaged, state=excluded).due is Reason.WORKER_EXCLUDED


def test_a_rejected_worker_is_excluded() -> None:
    both = {"a": "gpu", "b": "gpu"}
    done = after(Started("a"), Finished(COMPLETIONS["a"]))
    assert decided(done) == Done(COMPLETIONS["a"])
    assert (
        after(failed("b", TaskFailed), Observation.BROKER_RESTARTED, Finished(COMPLETIONS["b"]), state=done)
        is done
    )
    assert decided(after(lost(), state=done)) == Resend(Reason.RESULT_LOST)
    state = after(rejected("a"), state=done)
    assert decided(state) == Fail(Reason.RESULT_REJECTED), "no other worker serves it"
    assert decided(state, serving=both) == Resend(Reason.RESULT_REJECTED)
    state = after(Sent("gpu"), Started("a"), Finished(COMPLETIONS["a"]), state=state)
    assert decided(state, serving=both) == Resend(Reason.WORKER_EXCLUDED)
    assert decided(state, 600.1, serving=both) == Fail(Reason.WORKER_EXCLUDED)
    assert decided(state) == Fail(Reason.WORKER_EXCLUDED)
    assert after(failed("a", TaskFailed), state=state).due is Reason.WORKER_EXCLUDED
    assert decided(after(Sent("gpu"), Finished(COMPLETIONS["b"]), state=state)) == Done(COMPLETIONS["b"])
    assert decided(after(Sent("gpu"), state=state), serving={"a": "gpu", "b": "gpu.1"}) == Resend(
        Reason.MISROUTED
    )


def test_fresh_names_do_not_allow_any_number_of_wrong_results() -> None:
    """A worker may call itself otherwise in every answer; what its other answers were rejected for counts."""
    serving = {"a": "gpu", "b": "gpu"}
    state = after()
    for count in range(1, MOST_REJECTIONS):
        state = excluding(state, f"liar-{count}", ResultRejected("wrong"))
    done = after(Sent("gpu"), Finished(COMPLETIONS["a"]), state=state)
    assert decided(done, serving=serving) == Done(COMPLETIONS["a"]), "right results are taken"
    assert decided(after(rejected("a"), state=done), serving=serving) == Fail(Reason.RESULT_REJECTED)


def test_messages_become_events_of_their_own_request() -> None:
    output = Blob(job=JOB, kind="out", token=keys.output_token(TOKEN, "a"), nbytes=1)
    done = Completion(request=TOKEN, state="done", worker="a", output=output)
    assert event_of(done, REQUEST) == Finished(done)
    assert event_of(done.model_copy(update={"state": "started"}), REQUEST) == Started("a")
    failure = Failure(error="BlobMissing", what="gone")
    event = event_of(Completion(request=TOKEN, state="failed", worker="a", failure=failure), REQUEST)
    assert isinstance(event, Failed)
    assert isinstance(event.error, BlobMissing)
    for strange in (
        done.model_copy(update={"output": None}),
        done.model_copy(update={"output": output.model_copy(update={"kind": "in"})}),
        done.model_copy(update={"output": output.model_copy(update={"job": TOKEN})}),
        Completion(request=TOKEN, state="failed", worker="a"),
    ):
        event = event_of(strange, REQUEST)
        assert isinstance(event, Failed)
        assert isinstance(event.error, WireError)


def test_the_documentation_has_a_row_for_every_reason_and_no_other() -> None:
    rows = [line.split(" | ") for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    table = {row[0]: row[1:] for row in rows if row[0].strip("| `") in Reason.__members__}
    assert [name.strip("| `") for name in table] == [reason.name for reason in Reason]
    for reason in Reason:
        observed, action = table[f"| `{reason.name}`"]
        assert observed == reason.value
        assert len(action) > 10
    assert len([row for row in rows if re.fullmatch("[A-Z_]+", row[0].strip("| `"))]) == len(Reason)


def test_three_strikes_count_unless_the_broker_or_a_good_result_excuses_them() -> None:
    strikes = Strikes()
    # A broker that restarts loses many results at once.
    assert not any(strikes.add("a", now / 10, at_once=False) for now in range(20))
    assert not strikes.add("a", 2.0, at_once=False)
    assert not strikes.add("b", 2.0, at_once=False)
    assert strikes.add("a", 4.0, at_once=False)
    strikes.forgive("a")
    assert [strikes.add("a", 5.0, at_once=True) for _ in range(3)] == [False, False, True]
    strikes.forgive_all()
    assert not strikes.add("a", 9.0, at_once=False)


def test_a_completion_of_another_request_is_a_lie() -> None:
    other = COMPLETIONS["a"].model_copy(update={"request": "f" * 32})
    event = event_of(other, REQUEST)
    assert isinstance(event, Failed)
    assert isinstance(event.error, WireError)
