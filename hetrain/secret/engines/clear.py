"""Client half of `clear`: the quantisation and the verification of `rlwe` without any encryption.

It hides nothing. It separates the cost of quantisation from that of encryption, and makes runs reproducible
to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hetrain.public.errors import WireError
from hetrain.public.lattice.bounds import operand_bound
from hetrain.public.lattice.parameters import require_tokens
from hetrain.public.lattice.ring import DIGIT_OFFSET, LANES
from hetrain.public.model.quantization import Scales
from hetrain.public.protocol.messages import EngineHeader, Header
from hetrain.public.protocol.product import Operand, Part, Product
from hetrain.public.workspace import unaligned_empty
from hetrain.secret.activation_quantization import dequantize_result, quantize_operand
from hetrain.secret.engines.rlwe.ring_kernels import ring_kernels
from hetrain.secret.verification.job import Verification
from hetrain.secret.verification.parts import PartsCheck
from hetrain.secret.verification.rows import CheckRows
from hetrain.secret.verification.verdict import is_equal


@dataclass(frozen=True)
class ClearClaim:
    """Y must be X·Wᵀ exactly: see `hetrain.secret.verification.parts.Claim`.

    Attributes:
        planes: the digits of X, int8 [3, T, K].
        rows: draws rows R and R·W.
        rows_for: makes new rows for a range of W.
    """

    planes: torch.Tensor
    rows: Callable[[], CheckRows]
    rows_for: Callable[[torch.Tensor], CheckRows]

    def read(self, part: Part) -> torch.Tensor:
        """The part's products, int32 [T, n]."""
        tokens = self.planes.shape[1]
        if part.data.nbytes != 4 * part.n * tokens:
            raise WireError(f"{part.n} rows take {4 * part.n * tokens} bytes, not {part.data.nbytes}")
        return torch.frombuffer(part.data, dtype=torch.int32).view(tokens, part.n)

    def holds(self, rows: CheckRows, results: Sequence[torch.Tensor]) -> bool:
        """See `hetrain.secret.verification.verdict.is_equal`."""
        tokens = self.planes.shape[1]
        padded = torch.nn.functional.pad(self.planes, (0, 0, 0, -tokens % LANES))
        expected = ring_kernels().check_up(rows.image, padded)[:, :tokens]
        return is_equal(expected, torch.cat(list(results), dim=1), rows.values)


@dataclass(frozen=True)
class ClearOpening:
    """The scales of the tokens and of W's rows."""

    parts: PartsCheck[CheckRows, torch.Tensor]
    scales: torch.Tensor
    outputs: torch.Tensor | None

    def check(self, part: Part) -> None:
        """Verifies the product once it is complete; see `hetrain.secret.engine.Opening.check`."""
        self.parts.add(part)

    def open(self) -> torch.Tensor:
        """Y = X·Wᵀ, float32 [T, n]; see `hetrain.secret.engine.Opening`."""
        values = torch.cat([each.values for each in self.parts.results()], dim=1)
        return dequantize_result(values, self.scales, self.outputs)


@dataclass(frozen=True)
class ClearSealed:
    """The digits of the quantised operand itself, int8 [3, T, K]."""

    operand: Operand
    opening: ClearOpening


@dataclass(frozen=True)
class ClearSealer:
    """See `hetrain.secret.engine.Sealer`. `bits` limits the precision; None takes that of `rlwe`."""

    verification: Verification
    bits: int | None = None

    @property
    def setup(self) -> Header:
        """Empty."""
        return EngineHeader().to_wire()

    def for_micro_batch(self) -> ClearSealer:
        """Itself."""
        return self

    def seal(self, x: torch.Tensor, product: Product, channels: Scales | None = None) -> ClearSealed:
        """Quantises one operand as `rlwe` does; see `hetrain.secret.engine.Sealer.seal`."""
        require_tokens(len(x))
        columns = None if channels is None else channels.inputs
        quantized = quantize_operand(x, operand_bound(product.norms, product.n), self.bits, columns)
        planes = digit_planes(quantized.values)
        parts = PartsCheck(
            product,
            ClearClaim(planes, *self.verification.rows_of(product)),
            self.verification.weights,
        )
        operand = Operand(
            EngineHeader().to_wire(),
            [planes.numpy().data.cast("B")],
            result_bytes=4 * len(x) * product.n,
        )
        return ClearSealed(
            operand, ClearOpening(parts, quantized.scales, None if channels is None else channels.outputs)
        )


def digit_planes(values: torch.Tensor) -> torch.Tensor:
    """D with Σ_l 2^(8l)·D_l = values, D_l in −128..127: int32 [T, K] of |v| ≤ 0x7F7F7F -> int8 [3, T, K]."""
    planes = unaligned_empty((3, *values.shape), torch.int8)
    shifted = values + DIGIT_OFFSET
    for position, plane in enumerate(planes):
        plane.copy_(((shifted >> (8 * position)) & 0xFF) - 0x80)
    return planes
