"""Client half of `clear`: the quantisation of `rlwe` without any encryption. Hides nothing.

It separates the cost of quantisation from that of encryption, and makes runs reproducible to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hetrain.public.errors import WireError
from hetrain.public.lattice.parameters import parameters_for
from hetrain.public.lattice.result_format import largest_operand
from hetrain.public.protocol.messages import EngineHeader, Header
from hetrain.public.protocol.product import Operand, Part, Product
from hetrain.secret.activation_quantization import dequantize_result, limited, quantize_operand


@dataclass(frozen=True)
class ClearOpening:
    """The scales of the tokens."""

    scales: torch.Tensor

    def check(self, part: Part) -> None:
        """See `hetrain.secret.engine.Opening.check`."""
        self._values(part)

    def open(self, parts: Sequence[Part]) -> torch.Tensor:
        """Y = X·Wᵀ, float32 [T, n]; see `hetrain.secret.engine.Opening`."""
        return dequantize_result(torch.cat([self._values(part) for part in parts]), self.scales)

    def _values(self, part: Part) -> torch.Tensor:
        tokens = len(self.scales)
        if part.data.nbytes != 4 * part.n * tokens:
            raise WireError(
                f"a result of {part.n} rows has {part.data.nbytes} bytes, not {4 * part.n * tokens}"
            )
        return torch.frombuffer(part.data, dtype=torch.int32).view(part.n, tokens)


@dataclass(frozen=True)
class ClearSealed:
    """The quantized operand itself, int32 [K, T]."""

    operand: Operand
    opening: ClearOpening


@dataclass(frozen=True)
class ClearSealer:
    """See `hetrain.secret.engine.Sealer`. `bits` limits the precision; None takes that of `rlwe`."""

    bits: int | None = None

    @property
    def setup(self) -> Header:
        """Empty."""
        return EngineHeader().to_wire()

    def seal(self, x: torch.Tensor, product: Product) -> ClearSealed:
        """Quantises one operand; see `hetrain.secret.engine.Sealer.seal`."""
        return seal(x, product.max_l1, self.bits)


def seal(x: torch.Tensor, max_l1: int, bits: int | None = None) -> ClearSealed:
    """Quantises X as `rlwe.seal` does, at the same precision."""
    parameters = parameters_for(x.shape[0])
    quantized = quantize_operand(x, limited(largest_operand(parameters, max_l1), bits))
    payload = [quantized.values.numpy().data.cast("B")]
    operand = Operand(EngineHeader().to_wire(), payload, result_row_bytes=4 * len(x))
    return ClearSealed(operand, ClearOpening(quantized.scales))
