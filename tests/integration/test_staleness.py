"""The loop when one micro-batch is slow, and when it is stopped."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from hetrain.config import LoraConfig, OutsourcingConfig, TrainingConfig
from hetrain.data.packing import epochs
from hetrain.data.tokenization import read_rows
from hetrain.nn.lora import adapter_parameters, add_adapter
from hetrain.public.protocol.product import Operand, Product
from hetrain.train.loop import AppliedUpdate, train
from hetrain.train.session import open_base, open_session
from hetrain.train.updater import Tensors, Updater
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


OVERLAPPING = TrainingConfig(batch_tokens=256, max_length=64, in_flight=3, max_staleness=2, seed=1)
LOCK_STEP = replace(OVERLAPPING, batch_tokens=768, micro_batch_tokens=256, max_staleness=0)


@pytest.mark.usefixtures("one_thread")
def test_a_slow_micro_batch_is_waited_for_and_no_result_is_lost(tiny_llama: Path, tmp_path: Path) -> None:
    base = open_base(str(tiny_llama))
    rows = read_rows(HANDBOOK, base.tokenizer, 64)
    with open_session(base, OutsourcingConfig(engine="clear"), None, "cpu", tmp_path / "log") as session:
        assert sys.float_info.min / 2 == 0, "denormal numbers are flushed"
        model = add_adapter(session.split, LoraConfig(r=4, alpha=8, dropout=0.1), 1)
        fresh = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}

        def run(
            channel: Channel, config: TrainingConfig, count: int, stop_at: int = 99
        ) -> tuple[list[AppliedUpdate], Tensors]:
            for name, parameter in adapter_parameters(model).items():
                parameter.data.copy_(fresh[name])
            updater = Updater(adapter_parameters(model), config, 8)
            replicas = replace(session, channel=channel).replicas(model, config.replicas)
            batches = islice(epochs(rows, 256, 1, None), count)
            course: list[AppliedUpdate] = []
            for applied in train(
                updater, replicas, batches, config, session.channel.close, lambda: len(course) >= stop_at
            ):
                course.append(applied)
            return course, updater.snapshot().values

        # Two updates overlap with the slow one and wait for it: then it is all that is left to do.
        slowed, _ = run(DelayedChannel(session.channel, others=2 * SENDS), OVERLAPPING, count=8)
        assert [each.results[0].batch.index for each in slowed] == list(range(8))
        assert [each.results[0].staleness for each in slowed[:3]] == [0, 1, 2]
        assert all(each.results[0].staleness <= 2 for each in slowed)

        # In lock step neither that, nor how many are in flight, changes a bit; the last update has but one.
        late, disturbed = run(DelayedChannel(session.channel, others=2 * SENDS), LOCK_STEP, count=7)
        again, undisturbed = run(session.channel, replace(LOCK_STEP, in_flight=1), count=7)
        for course in (late, again):
            indices = [[result.batch.index for result in each.results] for each in course]
            assert indices == [[0, 1, 2], [3, 4, 5], [6]]
            assert all(result.staleness == 0 for each in course for result in each.results)
        assert all(torch.equal(value, undisturbed[name]) for name, value in disturbed.items())

        # Asked to stop at the second update, it makes those that have begun and no other.
        stopped, _ = run(session.channel, LOCK_STEP, count=99, stop_at=2)
        assert [len(each.results) for each in stopped] == [3, 3]
    assert sys.float_info.min / 2 > 0
