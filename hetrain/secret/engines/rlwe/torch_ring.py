"""The reference of the client's operations on a block of features, in torch's int64: see `RingKernels`.

Also what is used where nothing was compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch

from hetrain.public.lattice import result_format
from hetrain.public.lattice.ring import (
    DIGIT_OFFSET,
    DROPPED_BITS,
    LANES,
    MODULUS,
    RESULT_BITS,
    forward,
    inverse,
)
from hetrain.secret.activation_quantization import TokenNorms, token_norms

RESULT_MASK = (1 << RESULT_BITS) - 1
LARGEST_IMAGE = 0x7F7F7F
"""The largest entry of R·W: three signed 8-bit digits. |entries| ≤ 127·n, so n < 65,000 is always enough."""


@dataclass(frozen=True, eq=False)
class Message:
    """round(x[t, k]·columns[k]·inverse[t]), no further than `limit` ≤ 2^24 from zero; all float32."""

    x: torch.Tensor
    columns: torch.Tensor
    inverse: torch.Tensor
    limit: int


@dataclass(frozen=True, eq=False)
class ResultScales:
    """y[t, j] is a decrypted integer times tokens[t]·columns[j]: float32 [T] and [width]."""

    tokens: torch.Tensor
    columns: torch.Tensor


class TorchSpectrum:
    """The transform of a secret: int64 [d, N, 1]. Never serialised."""

    def __init__(self, secret: torch.Tensor) -> None:
        self.points = forward(secret.to(torch.int64)[:, :, None] % MODULUS)

    def dot(self, masks: torch.Tensor) -> torch.Tensor:
        """Σ_i a_i·s_i for the transforms int32 [blocks, d·N, 16] of a: int64 [N, 16·blocks] in 0..q−1."""
        rank, degree = self.points.shape[:2]
        products = masks.to(torch.int64).view(-1, rank, degree, LANES) * self.points % MODULUS
        return inverse(products.sum(dim=1) % MODULUS).transpose(0, 1).reshape(degree, -1)

    def __reduce__(self) -> NoReturn:
        """Refuses to be pickled or copied: a secret never leaves the memory it was drawn in."""
        raise TypeError("a secret cannot be serialised or copied")


@dataclass(frozen=True)
class TorchRing:
    """The reference, and what is used where nothing was compiled. See `RingKernels`."""

    name: str = "torch"

    def spectrum(self, secret: torch.Tensor) -> TorchSpectrum:
        """See `RingKernels.spectrum`."""
        return TorchSpectrum(secret)

    def token_norms(self, x: torch.Tensor, columns: torch.Tensor) -> TokenNorms:
        """See `RingKernels.token_norms`."""
        return token_norms(x, columns)

    def encrypt(
        self,
        planes: torch.Tensor,
        first: int,
        masks: torch.Tensor,
        keystream: torch.Tensor,
        message: Message,
        secret: TorchSpectrum,
    ) -> None:
        """See `RingKernels.encrypt`."""
        b = secret.dot(masks)
        b += noise(keystream).view(-1, len(b), LANES).transpose(0, 1).reshape(len(b), -1)
        out = planes[:, :, first : first + b.shape[1]]
        columns = slice(first, first + b.shape[1])
        x = message.x[:, columns] * message.columns[columns] * message.inverse[:, None]
        b = b[:, : out.shape[2]]
        b[: len(x)] += x.round().clamp(-message.limit, message.limit).to(torch.int64)
        # Half of 2^6 rounds; the digits of c are bytes with their top bits flipped.
        shifted = (b + (DIGIT_OFFSET << DROPPED_BITS)) % MODULUS
        c = (shifted + (1 << (DROPPED_BITS - 1))) >> DROPPED_BITS
        for position, plane in enumerate(out):
            plane.copy_(((c >> (8 * position)) & 0xFF) - 0x80)

    def unpack(self, packed: torch.Tensor, out: torch.Tensor) -> None:
        """See `RingKernels.unpack`."""
        out.copy_(result_format.unpack(packed, out.shape[1]))

    def decrypt(
        self,
        out: torch.Tensor,
        column: int,
        u: torch.Tensor,
        first: int,
        hint: torch.Tensor,
        scales: ResultScales,
        secret: TorchSpectrum,
    ) -> None:
        """See `RingKernels.decrypt`."""
        tokens = len(scales.tokens)
        a = secret.dot(hint)[:tokens]
        u = u[:tokens, first : first + a.shape[1]].to(torch.int64) & RESULT_MASK
        b = (u * MODULUS + (1 << (RESULT_BITS - 1))) >> RESULT_BITS
        half = MODULUS // 2
        values = (b - a[:, : u.shape[1]] + half) % MODULUS - half
        to = slice(column, column + u.shape[1])
        out[:, to] = values.to(torch.float32) * scales.tokens[:, None] * scales.columns[to]

    def check_up(self, image: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
        """See `RingKernels.check_up`. |sums| ≤ K·2^47: exact for K ≤ 2^16."""
        digits = planes.to(torch.int64)
        c = digits[0] + (digits[1] << 8) + (digits[2] << 16)
        sums: torch.Tensor = (image.to(torch.int64) @ c.t()) % MODULUS
        return ((sums << DROPPED_BITS) % MODULUS).to(torch.int32)

    def check_down(self, rows: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """See `RingKernels.check_down`."""
        sums: torch.Tensor = rows.to(torch.int64) @ u.to(torch.int64).t()
        return (sums & RESULT_MASK).to(torch.int32)


def noise(keystream: torch.Tensor) -> torch.Tensor:
    """Centred binomial, eta = 8: ones of byte 2i minus ones of byte 2i + 1; int64 [n] from uint8 [2·n].

    Bits are counted by arithmetic, since looking values up in a table would show them in the cache.
    """
    bits = (keystream.view(-1, 2, 1).to(torch.int64) >> torch.arange(8)) & 1
    ones = bits.sum(dim=2)
    return ones[:, 0] - ones[:, 1]
