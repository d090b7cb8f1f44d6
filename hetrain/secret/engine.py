"""The client half of an engine, and the table of all of them.

A job opens its engine once, which draws the job's keys, if there are any. The resulting sealer encrypts one
operand after another and returns, with each, the only object that can open its results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch

from hetrain.public.errors import UsageError
from hetrain.public.protocol.messages import Header
from hetrain.public.protocol.plan import Plan
from hetrain.public.protocol.product import Operand, Part, Product
from hetrain.secret.engines.clear import ClearSealer
from hetrain.secret.engines.concrete import MAX_BITS as CONCRETE_MAX_BITS
from hetrain.secret.engines.concrete import ConcreteSealer
from hetrain.secret.engines.rlwe.hints import HintStore
from hetrain.secret.engines.rlwe.seal import RlweSealer

MIN_BITS, MAX_BITS = 2, 25


class Opening(Protocol):
    """Opens the results of one sealed operand. Holds its secret; never leaves memory."""

    def check(self, part: Part) -> None:
        """Checks one part before it is used; see `hetrain.transport.channel.Accept`.

        Raises:
            WireError: its length is not that of its rows.
            ResultRejected: it is wrong; the error names the worker.
        """
        ...

    def open(self, parts: Sequence[Part]) -> torch.Tensor:
        """Y = X·Wᵀ: float32 [T, n], from checked parts that partition the rows of W, in order.

        Raises:
            WireError: a part does not have the shape that was asked for.
        """
        ...


class Sealed(Protocol):
    """One operand, ready to travel, and the opening of its results."""

    @property
    def operand(self) -> Operand: ...
    @property
    def opening(self) -> Opening: ...


class Sealer(Protocol):
    """The client half of an engine, with the keys of one job if it has any. Thread-safe."""

    @property
    def setup(self) -> Header:
        """Public: a worker must agree to it before the first product."""
        ...

    def seal(self, x: torch.Tensor, product: Product) -> Sealed:
        """Quantises and encrypts one operand.

        Args:
            x: activations or gradients, floating point [T, K], T ≤ 2048.
            product: gives W, by which x will be multiplied.

        Raises:
            ParameterError: x does not fit.
            NotFinite: x has a NaN or an infinity.
        """
        ...


@dataclass(frozen=True)
class JobOptions:
    """A job's options for its engine.

    Attributes:
        bits: the most bits that an operand's entries may have; None is the engine's own choice.
        hints: the store of products with the masks; None keeps none. Only `rlwe` has any.
    """

    bits: int | None = None
    hints: HintStore | None = None


@dataclass(frozen=True)
class ClientEngine:
    """One engine of the table.

    Attributes:
        name: as users and messages give it.
        hides: whether workers see ciphertexts only.
        new_sealer: starts a job.
        has_hints: whether it takes `JobOptions.hints`.
        max_bits: the largest `JobOptions.bits`.
    """

    name: str
    hides: bool
    new_sealer: Callable[[Plan, JobOptions], Sealer]
    has_hints: bool = False
    max_bits: int = MAX_BITS

    def open(self, plan: Plan, options: JobOptions) -> Sealer:
        """Starts a job. Raises `UsageError` when the engine cannot serve it with these options."""
        if options.bits is not None and not MIN_BITS <= options.bits <= self.max_bits:
            raise UsageError(
                f"engine {self.name!r} has no operands of {options.bits} bits",
                field="activation_bits",
                hint=f"{MIN_BITS} to {self.max_bits}",
            )
        return self.new_sealer(plan, options)


ENGINES: Mapping[str, ClientEngine] = MappingProxyType(
    {
        engine.name: engine
        for engine in (
            ClientEngine("rlwe", True, lambda plan, job: RlweSealer(job.bits, job.hints), has_hints=True),
            ClientEngine(
                "concrete", True, lambda plan, job: ConcreteSealer(plan, job.bits), max_bits=CONCRETE_MAX_BITS
            ),
            ClientEngine("clear", False, lambda plan, job: ClearSealer(job.bits)),
        )
    }
)


def client_engine(name: str) -> ClientEngine:
    """The engine called `name`. Raises `UsageError` for an unknown one."""
    try:
        return ENGINES[name]
    except KeyError:
        raise UsageError(
            f"unknown engine {name!r}", field="engine", hint=f"choose from: {', '.join(ENGINES)}"
        ) from None
