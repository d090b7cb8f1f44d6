"""A hundred thousand different orders of events around one request."""

from __future__ import annotations

import os
import random
from collections import Counter

from hetrain.transport.requests.decision import Decision, Done, Fail, Resend
from hetrain.transport.requests.state import COUNTED, Reason
from tests.harness.request_orders import EVENTS, JUMPS_S, QUEUES, WORKERS, RequestOrder, lost, rejected

SEED = int(os.environ.get("HETRAIN_TEST_SEED") or random.SystemRandom().randrange(1 << 32))
ORDERS = 100_000
FINAL = {Reason.RUN_LIMIT, Reason.NO_WORKER, Reason.GROUP_UNSERVED}


def step(order: RequestOrder, chance: random.Random) -> object:
    """One step; returns what identifies it."""
    if isinstance(order.outcome, Done):
        completion = order.state.completion
        assert completion is not None
        event = lost() if chance.random() < 0.3 else rejected(completion.worker)
        order.reopen(event)
        return type(event)
    kind = chance.random()
    if kind < 0.5:
        index = chance.randrange(len(EVENTS))
        order.observe(EVENTS[index])
        return index
    if kind < 0.75:
        order.tick(is_sent=(is_sent := chance.random() < 0.9))
        return is_sent
    if kind < 0.93:
        seconds, starts = chance.choice(JUMPS_S), chance.random() < 0.3
        (order.start_another if starts else order.pass_time)(seconds)
        return seconds, starts
    serving = {worker: chance.choice(QUEUES) for worker in WORKERS if chance.random() < 0.6}
    order.register(serving)
    return tuple(serving.items())


def test_a_hundred_thousand_orders_of_events() -> None:
    chance = random.Random(SEED)
    seen: set[int] = set()
    decisions: Counter[Decision] = Counter()
    while len(seen) < ORDERS:
        state = chance.getstate()
        order, steps = RequestOrder(), []
        try:
            for _ in range(chance.randrange(5, 40)):
                if isinstance(order.outcome, Fail):
                    break
                steps.append(step(order, chance))
            if order.outcome is None:
                order.stay_silent()
        except AssertionError as error:
            raise AssertionError(f"seed {SEED}, after {len(seen)} orders: {steps}; {error}") from error
        assert state != chance.getstate()
        seen.add(hash(tuple(steps)))
        decisions += order.decisions
    assert {each.reason for each in decisions if isinstance(each, Resend)} == set(Reason) - FINAL
    failures = FINAL | COUNTED | {Reason.FAILED, Reason.REFUSED, Reason.WORKER_EXCLUDED}
    assert {each.reason for each in decisions if isinstance(each, Fail)} == failures
