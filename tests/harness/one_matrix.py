"""A model of one matrix, for tests of the queue: the `clear` engine's operands, and exact products."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from hetrain.public.model.quantization import quantize
from hetrain.public.protocol.messages import Direction
from hetrain.public.protocol.plan import Member, Plan, group_of
from hetrain.public.protocol.product import Operand, Product
from hetrain.transport.celery_channel import CeleryChannel
from hetrain.transport.channel import Reply
from tests.harness.in_flight import InFlight

OUT, IN = 1536, 1024
Send = Callable[..., Future[Reply]]


def save_model(directory: Path) -> Path:
    """A checkpoint with one matrix, in a new directory."""
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))
    save_file({"w.weight": weight}, directory / "model.safetensors")
    return directory


def matrix_of(model: Path) -> np.ndarray:
    """Its int8 form."""
    return quantize(load_file(model / "model.safetensors")["w.weight"]).values.numpy()


def plan_of(matrix: np.ndarray) -> Plan:
    """The plan whose only group it is."""
    members = (Member(module="w", tensor="w.weight", out_features=OUT),)
    return Plan(model="tiny", groups=(group_of(members, torch.from_numpy(matrix)),))


def operand(rows: int, tokens: int, seed: int = 0) -> np.ndarray:
    """Digits of tokens of `rows` features, as the engine clear sends them."""
    return np.random.default_rng(seed).integers(-128, 128, (3, tokens, rows), dtype=np.int8)


def exact(matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x·Wᵀ modulo 2^32; float64 products are exact here."""
    low, middle, high = x.astype(np.float64)
    total = ((low + 2.0**8 * middle + 2.0**16 * high) @ matrix.T.astype(np.float64)).astype(np.int64)
    return total.astype(np.uint32).view(np.int32)


def values(reply: Reply, tokens: int) -> np.ndarray:
    parts = [np.frombuffer(part.data, np.int32).reshape(tokens, -1) for part in reply.parts]
    return np.concatenate(parts, axis=1)


def sender(in_flight: InFlight, plan: Plan) -> Send:
    """Starts x·Wᵀ, or x·W, in so many pieces."""

    def start(
        channel: CeleryChannel, x: np.ndarray, direction: Direction = "forward", pieces: int = 1
    ) -> Future[Reply]:
        parts = [memoryview(x[:1]).cast("B"), memoryview(x[1:]).cast("B")]
        return in_flight.start(channel, Product(plan.groups[0], direction), Operand({}, parts), pieces=pieces)

    return start
