"""The client half of an engine, and the table of all of them.

A job opens its engine once. The resulting sealer encrypts one operand after another and returns, with each,
the only object that can verify and open its results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch

from hetrain.public.errors import UsageError
from hetrain.public.model.quantization import Scales
from hetrain.public.protocol.messages import Header
from hetrain.public.protocol.plan import Plan
from hetrain.public.protocol.product import Operand, Part, Product
from hetrain.secret.engines.clear import ClearSealer
from hetrain.secret.engines.concrete import MAX_BITS as CONCRETE_MAX_BITS
from hetrain.secret.engines.concrete import ConcreteSealer
from hetrain.secret.engines.rlwe.hints import HintStore
from hetrain.secret.engines.rlwe.seal import RlweSealer
from hetrain.secret.verification.job import Verification

MIN_BITS, MAX_BITS = 2, 24


class Opening(Protocol):
    """Verifies and opens the results of one sealed operand. Holds its secret; never leaves memory."""

    def check(self, part: Part) -> None:
        """Takes one part, and verifies the product once its parts partition the rows of W.

        Raises:
            ResultRejected: the product is wrong, or a part's length; see `hetrain.transport.channel.Accept`.
        """
        ...

    def open(self) -> torch.Tensor:
        """Y = ((X·diag(c))·Wᵀ)·diag(s): float32 [T, n], from the parts that were verified.

        Raises:
            WireError: the product was not verified.
        """
        ...


class Sealed(Protocol):
    """One operand, ready to travel, and the opening of its results."""

    @property
    def operand(self) -> Operand: ...
    @property
    def opening(self) -> Opening: ...


class Sealer(Protocol):
    """The client half of an engine, for one job. Thread-safe."""

    @property
    def setup(self) -> Header:
        """Public: a worker must agree to it before the first product."""
        ...

    def for_micro_batch(self) -> Sealer:
        """The sealer of one micro-batch: with keys of its own where keys serve several operands."""
        ...

    def seal(self, x: torch.Tensor, product: Product, channels: Scales | None = None) -> Sealed:
        """Quantises and encrypts one operand of Y = ((X·diag(c))·Wᵀ)·diag(s), which the opening gives.

        Args:
            x: activations or gradients, floating point [T, K], T ≤ 2048.
            product: gives W, by which x will be multiplied.
            channels: s and c; None: all are one.

        Raises:
            ParameterError: x does not fit.
            NotFinite: x has a NaN or an infinity.
        """
        ...


@dataclass(frozen=True)
class JobOptions:
    """A job's options for its engine.

    Attributes:
        verification: rows that check results.
        bits: the most bits that an operand's entries may have; None is the engine's own choice.
        hints: the client's store of products with masks, for an engine that `needs_hints`.
    """

    verification: Verification
    bits: int | None = None
    hints: HintStore | None = None


@dataclass(frozen=True)
class ClientEngine:
    """One engine of the table.

    Attributes:
        name: as users and messages give it.
        hides: whether workers see ciphertexts only.
        new_sealer: starts a job.
        needs_hints: whether it needs `JobOptions.hints`.
        max_bits: the largest `JobOptions.bits`.
    """

    name: str
    hides: bool
    new_sealer: Callable[[Plan, JobOptions], Sealer]
    needs_hints: bool = False
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


def _rlwe(plan: Plan, job: JobOptions) -> Sealer:
    if job.hints is None:
        raise UsageError("engine 'rlwe' needs hints", field="engine")
    return RlweSealer(job.verification, job.hints, job.bits)


def _concrete(plan: Plan, job: JobOptions) -> Sealer:
    return ConcreteSealer(plan, job.verification, job.bits)


def _clear(plan: Plan, job: JobOptions) -> Sealer:
    return ClearSealer(job.verification, job.bits)


ENGINES: Mapping[str, ClientEngine] = MappingProxyType(
    {
        engine.name: engine
        for engine in (
            ClientEngine("rlwe", True, _rlwe, needs_hints=True),
            ClientEngine("concrete", True, _concrete, max_bits=CONCRETE_MAX_BITS),
            ClientEngine("clear", False, _clear),
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
