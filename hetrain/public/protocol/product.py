"""One product with a group's matrix: what it multiplies, what travels up for it, and what comes back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hetrain.public.model.quantization import Norms
from hetrain.public.protocol.messages import DIRECTIONS, Direction, Header
from hetrain.public.protocol.plan import Group, Plan

RowRange = tuple[int, int]
"""Rows ``start:stop`` of a product's matrix, that is columns of its result."""
ProductKey = tuple[str, Direction]


@dataclass(frozen=True)
class Product:
    """Y = X·Wᵀ: W [n, k] is a group's int8 matrix Q (forward) or Qᵀ (backward)."""

    group: Group
    direction: Direction

    @property
    def key(self) -> ProductKey:
        """Group's name and direction: unique within a plan."""
        return self.group.name, self.direction

    @property
    def n(self) -> int:
        """Rows of W: width of the result."""
        return self.group.out_features if self.direction == "forward" else self.group.in_features

    @property
    def k(self) -> int:
        """Columns of W: width of the operand."""
        return self.group.in_features if self.direction == "forward" else self.group.out_features

    @property
    def norms(self) -> Norms:
        """Of W."""
        return self.group.forward if self.direction == "forward" else self.group.backward

    def __str__(self) -> str:
        return f"{self.group.name} {self.direction}"


def products_of(plan: Plan) -> Iterator[Product]:
    """All products of a plan, both directions of a group one after the other."""
    return (Product(group, direction) for group in plan.groups for direction in DIRECTIONS)


@dataclass(frozen=True)
class Operand:
    """A sealed operand, ready to travel.

    Attributes:
        header: the engine's public part of the message.
        payload: its bytes, as parts that travel one after the other. They must not change until the reply is
            there, since a lost request is sent again from them.
        result_bytes: bytes of the whole result, in as many ranges as it may come.
        row_step: rows of W that workers evaluate together: where the product is best partitioned.
    """

    header: Header
    payload: Sequence[memoryview]
    result_bytes: int = 0
    row_step: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return sum(part.nbytes for part in self.payload)


@dataclass(frozen=True)
class Part:
    """The result of one row range.

    Attributes:
        rows: which rows of W.
        data: the result's bytes, of unknown content.
        worker: the name of the worker that computed it.
        device: what it says it computed on.
        seconds: of computing, as it says.
    """

    rows: RowRange
    data: memoryview
    worker: str = ""
    device: str = ""
    seconds: float = 0.0

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.rows[1] - self.rows[0]
