"""Setup and header of `concrete`: travel beside the ciphertexts, public."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from hetrain.public.concrete.circuits import MAX_COLUMNS, MAX_ROWS, CircuitSpec
from hetrain.public.protocol.messages import EngineHeader, Line, Token


def _of_whole_bits(entry: int) -> int:
    if entry & (entry + 1):
        raise ValueError("not one less than a power of two")
    return entry


# So that no client can have a worker compile a circuit for each number.
LargestEntry = Annotated[int, Field(ge=1, le=1 << 16), AfterValidator(_of_whole_bits)]


class ConcreteSetup(EngineHeader):
    """Both sides agree on it before the first product.

    Attributes:
        package_version: the client's version of concrete-python.
        x_max: the largest entry of an operand.
        circuits: digest of every circuit of the plan, by `CircuitSpec.name`.
    """

    package_version: Line
    x_max: LargestEntry
    circuits: dict[str, Token]


class ConcreteHeader(EngineHeader):
    """The header of one product: a circuit's digest, and the part of its spec that the plan does not fix."""

    circuit: Token
    rows: Annotated[int, Field(ge=1, le=MAX_ROWS)]
    columns: Annotated[int, Field(ge=1, le=MAX_COLUMNS)]
    x_max: LargestEntry

    def spec(self, k: int) -> CircuitSpec:
        """The circuit for operands of k features."""
        return CircuitSpec(self.rows, k, self.columns, self.x_max)
