"""The client's two heavy operations on a block of rows, and which version of them this machine has.

    encrypt   b_k = a_k·s + e_k + round(x_k / scale)      modulo 2^32
    decrypt   y_j = scale·(b'_j·2^16 − a'_j·s)            modulo 2^32, signed

Both versions give the same numbers to the bit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hetrain.public.lattice.parameters import MODULUS_BITS, SWITCHED_A_BITS, SWITCHED_B_BITS
from hetrain.secret.activation_quantization import rounded
from hetrain.secret.engines.rlwe.native import NativeKernels, library
from hetrain.secret.engines.rlwe.negacyclic import TransformedSecret
from hetrain.secret.randomness import centred_binomial

BLOCK_ROWS = 32
"""Rows of masks at a time: masks and keystream of a block stay within a core's cache."""

_B_SHIFT = MODULUS_BITS - SWITCHED_B_BITS
_A_SHIFT = MODULUS_BITS - SWITCHED_A_BITS


class Kernels(Protocol):
    """One version of them. Thread-safe."""

    @property
    def name(self) -> str:
        """For logs."""
        ...

    def transform(self, secret: torch.Tensor) -> Any:
        """A secret int8 [d, N] in {-1, 0, 1}, made ready for the other two; it cannot be serialised."""
        ...

    def encrypt(
        self,
        out: torch.Tensor,
        masks: torch.Tensor,
        keystream: torch.Tensor,
        x: torch.Tensor,
        inverse: torch.Tensor,
        limit: int,
        start: int,
        eta: int,
        secret: Any,
    ) -> None:
        """Encrypts columns ``start : start + rows`` of x.

        Args:
            out: int32 [rows, N], written.
            masks: int32 [rows, d·N].
            keystream: fresh uint8 [6·rows·N], which becomes centred binomial noise; used up.
            x: float32 [T, K], T ≤ N, the whole operand.
            inverse: float32 [T], by which each token is multiplied before it is rounded.
            limit: the largest entry after rounding.
            start: the block's first column of x.
            eta: parameter of the noise.
            secret: from `transform`.
        """
        ...

    def decrypt(
        self,
        out: torch.Tensor,
        column: int,
        b: torch.Tensor,
        high: torch.Tensor,
        low: torch.Tensor,
        scales: torch.Tensor,
        secret: Any,
    ) -> None:
        """Decrypts rows of a product into columns ``column : column + rows`` of out.

        Args:
            out: float32 [T, n], T ≤ N.
            column: the first to be written.
            b: int16 [rows, N], bits 16 to 31 of b'.
            high: int16 [rows, d·N], bits 16 to 31 of a'.
            low: uint8 [rows, d·N], bits 8 to 15 of a'.
            scales: float32 [T].
            secret: from `transform`.
        """
        ...


@dataclass(frozen=True)
class TorchKernels:
    """The reference, and what is used where nothing was compiled."""

    name: str = "torch"

    def transform(self, secret: torch.Tensor) -> TransformedSecret:
        """See `Kernels.transform`."""
        return TransformedSecret(secret)

    def encrypt(
        self,
        out: torch.Tensor,
        masks: torch.Tensor,
        keystream: torch.Tensor,
        x: torch.Tensor,
        inverse: torch.Tensor,
        limit: int,
        start: int,
        eta: int,
        secret: TransformedSecret,
    ) -> None:
        """See `Kernels.encrypt`."""
        rows, tokens = len(out), len(x)
        halves = (-1, 2, secret.ring_degree // 2)
        noise = centred_binomial(keystream, eta)
        torch.add(secret.dot(masks), noise.view(halves), out=out.view(halves))
        out[:, :tokens] += rounded(x[:, start : start + rows], inverse, limit)

    def decrypt(
        self,
        out: torch.Tensor,
        column: int,
        b: torch.Tensor,
        high: torch.Tensor,
        low: torch.Tensor,
        scales: torch.Tensor,
        secret: TransformedSecret,
    ) -> None:
        """See `Kernels.decrypt`."""
        rows, tokens = len(b), len(out)
        a = join_planes(high, low)
        halves = (b.to(torch.int32) << _B_SHIFT).view(-1, 2, secret.ring_degree // 2)
        values = (halves - secret.dot(a)).reshape(rows, secret.ring_degree)[:, :tokens]
        torch.mul(values.t().to(torch.float32), scales[:, None], out=out[:, column : column + rows])


def join_planes(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """a'·2^8 modulo 2^32 from its top 16 bits (int16) and the 8 below (uint8): int32 of the same shape."""
    return (high.to(torch.int32) << 16) | (low.to(torch.int32) << _A_SHIFT)


@functools.cache
def kernels() -> Kernels:
    """The compiled version where there is one, else torch's."""
    found = library()
    return TorchKernels() if found is None else NativeKernels(found)
