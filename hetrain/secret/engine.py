"""What the client half of an engine does, and the table of all of them.

A job opens its engine once, which draws whatever keys a job has. The sealer it gets hides one operand after
another and hands back, with what travels, the only object that can open the answer.
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
from hetrain.secret.engines.concrete import ConcreteSealer
from hetrain.secret.engines.rlwe.hints import HintStore
from hetrain.secret.engines.rlwe.seal import RlweSealer

MIN_BITS, MAX_BITS = 2, 25


class Opening(Protocol):
    """Opens the results of one sealed operand. Holds its secret and never leaves memory."""

    def check(self, part: Part) -> None:
        """Looks at one part before it is used; see `hetrain.transport.channel.Accept`.

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
    """One operand, ready to travel, and what opens its results."""

    @property
    def operand(self) -> Operand: ...
    @property
    def opening(self) -> Opening: ...


class Sealer(Protocol):
    """The client half of an engine, with the keys of one job if it has any. Thread-safe."""

    @property
    def setup(self) -> Header:
        """Public: what a worker must know and agree to before the first product."""
        ...

    def seal(self, x: torch.Tensor, product: Product) -> Sealed:
        """Quantises and hides one operand.

        Args:
            x: activations or gradients, floating point [T, K], T ≤ 2048.
            product: what it will be multiplied by.

        Raises:
            ParameterError: x does not fit.
            NotFinite: x has a NaN or an infinity.
        """
        ...


@dataclass(frozen=True)
class JobOptions:
    """What a job may ask of its engine.

    Attributes:
        bits: the most bits that an operand's entries may have; None is the engine's own choice.
        hints: where products with the masks are kept; None keeps none. Only `rlwe` has any.
    """

    bits: int | None = None
    hints: HintStore | None = None

    def __post_init__(self) -> None:
        if self.bits is not None and not MIN_BITS <= self.bits <= MAX_BITS:
            raise UsageError(
                f"{self.bits} bits are out of range",
                field="activation_bits",
                hint=f"{MIN_BITS} to {MAX_BITS}",
            )


@dataclass(frozen=True)
class ClientEngine:
    """A client half and what to tell the user about it."""

    name: str
    hides: bool
    """Whether workers see ciphertexts only."""
    open: Callable[[Plan, JobOptions], Sealer]
    """Starts a job."""
    has_hints: bool = False


ENGINES: Mapping[str, ClientEngine] = MappingProxyType(
    {
        engine.name: engine
        for engine in (
            ClientEngine("rlwe", True, lambda plan, options: RlweSealer(options.bits, options.hints), True),
            ClientEngine("concrete", True, lambda plan, options: ConcreteSealer(plan, options.bits)),
            ClientEngine("clear", False, lambda plan, options: ClearSealer(options.bits)),
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
