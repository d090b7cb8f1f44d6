"""The asynchronous loop when one micro-batch is slow, and when it is stopped."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from hetrain.config import LoraConfig, OutsourcingConfig, TrainingConfig
from hetrain.data.packing import epochs
from hetrain.data.tokenization import read_rows
from hetrain.nn.lora import adapter_parameters, add_adapter
from hetrain.public.protocol.product import Operand, Product
from hetrain.train.loop import AppliedUpdate, train
from hetrain.train.session import open_base, open_session
from hetrain.train.updater import Updater
from hetrain.transport.channel import Accept, Channel, Reply
from tests.harness.processes import HANDBOOK

SENDS = 15  # of one micro-batch of `tiny_llama`: eight groups forward, seven backward


class DelayedChannel:
    """A channel whose first micro-batch waits at its first product until the others got `others` results."""

    def __init__(self, channel: Channel, others: int) -> None:
        self._channel = channel
        self._left = others
        self._lock = threading.Lock()
        self._slow: int | None = None
        self._free = threading.Event()

    def __getattr__(self, name: str) -> object:
        return getattr(self._channel, name)

    def multiply(self, product: Product, operand: Operand, accept: Accept) -> Reply:
        me = threading.get_ident()
        with self._lock:
            self._slow = self._slow or me
        if me == self._slow:
            assert self._free.wait(60)
        reply = self._channel.multiply(product, operand, accept)
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._free.set()
        return reply


@pytest.mark.usefixtures("one_thread")
def test_a_slow_micro_batch_is_waited_for_and_no_result_is_lost(tiny_llama: Path, tmp_path: Path) -> None:
    base = open_base(str(tiny_llama))
    rows = read_rows(HANDBOOK, base.tokenizer, 64)
    config = TrainingConfig(in_flight=3, max_staleness=2, seed=1)
    with open_session(base, OutsourcingConfig(engine="clear"), None, "cpu", tmp_path / "log") as session:
        assert sys.float_info.min / 2 == 0, "denormal numbers are flushed"
        model = add_adapter(session.split, LoraConfig(r=4, alpha=8), 1)
        updater = Updater(adapter_parameters(model), config, 8)

        def run(channel: Channel, count: int, stop_at: int) -> list[AppliedUpdate]:
            replicas = replace(session, channel=channel).replicas(model, config.in_flight)
            batches = islice(epochs(rows, 256, 1, None), count)
            course: list[AppliedUpdate] = []
            for applied in train(
                updater, replicas, batches, config, session.channel.close, lambda: len(course) >= stop_at
            ):
                course.append(applied)
            return course

        # The other replicas overtake it twice, and finish two more that must wait: then there is nothing left
        # to do but to let it land. Without a bound it would come after four updates.
        slowed = run(DelayedChannel(session.channel, others=4 * SENDS), count=8, stop_at=99)
        order = [applied.results[0].batch.index for applied in slowed]
        assert sorted(order) == list(range(8))
        assert order[2] in (0, 1, 2)  # the slow one, whichever was the first to send
        assert max(applied.update.step - 1 - applied.results[0].version for applied in slowed) == 2

        # Asked to stop at the second update, it applies what is in flight and draws no more.
        stopped = run(session.channel, count=99, stop_at=2)
        assert sorted(a.results[0].batch.index for a in stopped) == list(range(len(stopped)))
        assert 2 <= len(stopped) <= 2 + config.in_flight
    assert sys.float_info.min / 2 > 0
