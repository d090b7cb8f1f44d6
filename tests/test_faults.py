"""A worker is killed in the middle of a step, and training does not notice."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import psutil
import torch

from benchmarks.convergence import cosine
from hetrain.nn.lora import LoraSettings, adapter_parameters, add_adapter
from hetrain.public.wire import Direction
from hetrain.train.loop import train
from hetrain.train.packing import epochs
from hetrain.train.rows import read_rows
from hetrain.train.session import open_base, open_session
from hetrain.train.settings import FlightSettings, OptimizerSettings, OutsourcingSettings
from hetrain.train.updates import Tensors, Updater
from hetrain.transport.channel import Channel, Header, Pending, Rows

HANDBOOK = Path(__file__).resolve().parents[1] / "examples" / "handbook.jsonl"
UPDATES = 2


class Assassin:
    """A channel that kills every worker process with SIGKILL right after it sent certain requests."""

    def __init__(self, channel: Channel, victims: Sequence[int]) -> None:
        self._channel = channel
        self._victims = victims
        self._sent = 0
        self.kills = 0

    def prepare(self, model: str, engine: str, plan: bytes, plan_digest: str):  # type: ignore[no-untyped-def]
        return self._channel.prepare(model, engine, plan, plan_digest)

    def send(
        self,
        group: str,
        direction: Direction,
        header: Header,
        payload: Sequence[memoryview],
        rows: Sequence[Rows],
    ) -> Pending:
        pending = self._channel.send(group, direction, header, payload, rows)
        self._sent += 1
        if self._sent in self._victims:
            for process in psutil.Process().children(recursive=True):
                if "worker" in process.cmdline() and "gpu" in process.cmdline():
                    os.kill(process.pid, signal.SIGKILL)
                    self.kills += 1
        return pending

    def close(self) -> None:
        self._channel.close()


def adapter_after(model: Path, engine: str, log: Path, victims: Sequence[int]) -> Tensors:
    """The adapter after two updates in lock step, with workers killed after the given requests."""
    base = open_base(str(model))
    rows = read_rows(HANDBOOK, base.tokenizer, 64)[:40]
    flight = FlightSettings(in_flight=2, sync=True)
    with open_session(base, OutsourcingSettings(engine), None, "cpu", log) as session:
        channel = Assassin(session.channel, victims)
        model = add_adapter(session.split, LoraSettings(r=4, alpha=8, dropout=0.1), 1)
        parameters = adapter_parameters(model)
        updater = Updater(parameters, OptimizerSettings(learning_rate=1e-2), UPDATES)
        replicas = replace(session, channel=channel).replicas(model, flight.in_flight)
        batches = islice(epochs(rows, 256, 1, None), UPDATES * flight.in_flight)
        applied = list(train(updater, replicas, batches, flight, 1, channel.close))
        assert len(applied) == UPDATES
        assert channel.kills >= len(victims)
    return updater.snapshot().values


def test_clear_is_bit_identical_and_rlwe_equal_up_to_noise(tiny_llama: Path, tmp_path: Path) -> None:
    calm = adapter_after(tiny_llama, "clear", tmp_path / "1.log", victims=())
    disturbed = adapter_after(tiny_llama, "clear", tmp_path / "2.log", victims=(7, 35))
    assert calm.keys() == disturbed.keys()
    assert all(torch.equal(calm[name], disturbed[name]) for name in calm)
    encrypted = adapter_after(tiny_llama, "rlwe", tmp_path / "3.log", victims=(20,))
    assert cosine(encrypted, calm) > 0.99
    assert not all(torch.equal(calm[name], encrypted[name]) for name in calm), "noise must be fresh"
