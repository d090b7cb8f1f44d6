"""How often client and worker wait for the broker: a relay before each of them counts."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path

import torch

from hetrain.transport.celery_channel import CeleryChannel
from tasks.supervisor.server import start_worker, stop
from tests.harness.engine import EngineHarness
from tests.harness.processes import broker_server
from tests.harness.relay import Relay

PRODUCTS = 200
WARM_UP = 10
MOST = 10
MOST_TO_OPEN = 10
SIDES = ("client", "worker")


def test_a_product_takes_at_most_ten_round_trips(tmp_path: Path) -> None:
    """All of them count: heartbeats, events for Flower, and the round of every second as well."""
    harness = EngineHarness("clear", {"w": torch.randn(64, 96)}, tmp_path / "tiny")
    product = harness.product("w", "forward")
    with ExitStack() as stack:
        served = stack.enter_context(broker_server())
        broker = served.directory / "broker.sock"
        relays = {side: Relay(served.directory / f"{side}.sock", broker) for side in SIDES}
        urls = {side: served.url.replace("broker.sock", f"{side}.sock") for side in SIDES}
        for relay in relays.values():
            stack.callback(relay.close)
        worker = start_worker(1, urls["worker"], str(tmp_path / "tiny"), served.log)
        stack.callback(stop, [worker])
        channel = stack.enter_context(closing(CeleryChannel(urls["client"])))
        opening = dict(relays["client"].commands)
        opening.pop("BLMPOP", None)  # the collector's wait for completions, which may have begun
        assert 0 < sum(opening.values()) <= MOST_TO_OPEN, opening
        channel.prepare(harness.plan.model, "clear", harness.plan.to_bytes(), harness.plan.digest)
        expected = None
        for count in range(WARM_UP + PRODUCTS):
            if count == WARM_UP:
                for relay in relays.values():
                    relay.commands.clear()
            sealed = harness.seal("w", "forward", torch.ones(5, 96))
            reply = channel.multiply(product, sealed.operand, sealed.opening.check)
            assert len(reply.parts) == 1
            y = sealed.opening.open()
            expected = y if expected is None else expected
            assert torch.equal(y, expected)
        counts = {side: dict(relay.commands) for side, relay in relays.items()}
    total = sum(sum(commands.values()) for commands in counts.values())
    assert total <= MOST * PRODUCTS, counts
    for side, names in (
        ("client", ("SET", "LPUSH", "BLMPOP", "GET")),
        ("worker", ("BRPOP", "EVAL", "GET", "SET")),
    ):
        assert all(counts[side].get(name, 0) >= PRODUCTS / 2 for name in names), "the relay misses commands"
