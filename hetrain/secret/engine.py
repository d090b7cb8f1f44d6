"""What the client half of an engine does, and the table of all of them.

An engine seals one operand and hands back, with what travels, the only object that can open the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch

from hetrain.public.errors import UsageError
from hetrain.secret import clear, rlwe


class Opening(Protocol):
    """Opens the results of one sealed operand. Holds its secret and never leaves memory."""

    def open(self, parts: Sequence[memoryview], rows: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Y = X·Wᵀ: float32 [T, n], from one result per row range of W.

        Raises:
            WireError: a result does not have the shape that was asked for.
        """
        ...


class Sealed(Protocol):
    """One operand, ready to travel."""

    @property
    def header(self) -> dict[str, str | int]: ...
    @property
    def payload(self) -> list[memoryview]: ...
    @property
    def opening(self) -> Opening: ...


class Seal(Protocol):
    """The client half of an engine."""

    def __call__(self, x: torch.Tensor, max_l1: int) -> Sealed:
        """Quantises and hides one operand.

        Args:
            x: activations or gradients, floating point [T, K], T ≤ 2048.
            max_l1: max_j ‖W_j‖₁ of the int8 matrix that it will meet.

        Raises:
            ParameterError: x does not fit.
            NotFinite: x has a NaN or an infinity.
        """
        ...


@dataclass(frozen=True)
class ClientEngine:
    """A client half and what to tell the user about it."""

    name: str
    seal: Seal
    hides: bool
    """Whether workers see ciphertexts only."""


ENGINES: Mapping[str, ClientEngine] = MappingProxyType(
    {
        "rlwe": ClientEngine("rlwe", rlwe.seal, hides=True),
        "clear": ClientEngine("clear", clear.seal, hides=False),
    }
)


def client_engine(name: str) -> ClientEngine:
    """The engine called `name`. Raises `UsageError` for an unknown one."""
    try:
        return ENGINES[name]
    except KeyError:
        raise UsageError(
            f"unknown engine {name!r}", where="--engine", hint=f"choose from: {', '.join(ENGINES)}"
        ) from None
