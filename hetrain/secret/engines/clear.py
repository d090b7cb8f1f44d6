"""Client half of `clear`: the quantisation of `rlwe` without any encryption. Hides nothing.

It exists to tell what quantisation costs from what encryption costs, and to make runs reproducible to the
bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hetrain.public.errors import WireError
from hetrain.public.lattice.parameters import largest_operand, parameters_for
from hetrain.public.protocol.messages import Direction, Header
from hetrain.public.protocol.plan import Group
from hetrain.secret.activation_quantization import dequantize_result, limited, quantize_operand


@dataclass(frozen=True)
class ClearOpening:
    """The scales of the tokens."""

    scales: torch.Tensor

    def open(self, parts: Sequence[memoryview], rows: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Y = X·Wᵀ, float32 [T, n]; see `hetrain.secret.engine.Opening`."""
        tokens = self.scales.shape[0]
        values = []
        for part, (start, stop) in zip(parts, rows, strict=True):
            expected = 4 * (stop - start) * tokens
            if part.nbytes != expected:
                raise WireError(f"a result of {stop - start} rows has {part.nbytes} bytes, not {expected}")
            values.append(torch.frombuffer(part, dtype=torch.int32).view(stop - start, tokens))
        return dequantize_result(torch.cat(values), self.scales)


@dataclass(frozen=True)
class ClearSealed:
    """The quantised operand itself, int32 [K, T]."""

    header: Header
    payload: list[memoryview]
    opening: ClearOpening
    row_step: int = 1


@dataclass(frozen=True)
class ClearSealer:
    """See `hetrain.secret.engine.Sealer`. `bits` limits the precision; None takes that of `rlwe`."""

    bits: int | None = None

    @property
    def setup(self) -> Header:
        """Workers need to know nothing in advance."""
        return {}

    def seal(self, x: torch.Tensor, group: Group, direction: Direction) -> ClearSealed:
        """Quantises one operand; see `hetrain.secret.engine.Sealer.seal`."""
        return seal(x, group.max_l1(direction), self.bits)


def seal(x: torch.Tensor, max_l1: int, bits: int | None = None) -> ClearSealed:
    """Quantises X as `rlwe.seal` does, at the same precision."""
    parameters = parameters_for(x.shape[0])
    operand = quantize_operand(x, limited(largest_operand(parameters, max_l1), bits))
    return ClearSealed(
        header={},
        payload=[operand.values.numpy().data.cast("B")],
        opening=ClearOpening(operand.scales),
    )
