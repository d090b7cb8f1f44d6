"""The client's two heavy operations on a block of rows, and the version of them that this machine has.

    encrypt   b_k = a_k·s + e_k + round(x_k / scale)      modulo 2^32
    decrypt   y_j = scale·(b'_j·2^16 − a'_j·s)            modulo 2^32, signed

Both versions give the same numbers to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hetrain.public.lattice.result_format import B_SHIFT, join_planes
from hetrain.secret.activation_quantization import rounded
from hetrain.secret.engines.rlwe.native import NativeKernels, library
from hetrain.secret.engines.rlwe.negacyclic import TransformedSecret
from hetrain.secret.randomness import centred_binomial

BLOCK_ROWS = 32
"""Rows of masks at a time: masks and keystream of a block stay within a core's cache."""

Planes = Sequence[torch.Tensor]
"""b' >> 16, int16 [rows, N]; a' >> 16, int16 [rows, d·N]; bits 8 to 15 of a', uint8 [rows, d·N]."""


@dataclass(frozen=True, repr=False)
class ScaledOperand:
    """X, and how it becomes integers with noise.

    Attributes:
        x: float32 [T, K], T ≤ N.
        inverse: float32 [T], by which each token is multiplied before it is rounded.
        x_max: the largest entry after rounding.
        eta: parameter of the centred binomial noise.
    """

    x: torch.Tensor
    inverse: torch.Tensor
    x_max: int
    eta: int


class Kernels(Protocol):
    """One version of both operations. Thread-safe."""

    @property
    def name(self) -> str:
        """For logs."""
        ...

    def transform(self, secret: torch.Tensor) -> Any:
        """A secret int8 [d, N] in {-1, 0, 1}, made ready for the other two; it cannot be serialised."""
        ...

    def encrypt(
        self, out: torch.Tensor, operand: ScaledOperand, start: int, masks: torch.Tensor,
        keystream: torch.Tensor, secret: Any,
    ) -> None:  # fmt: skip
        """Encrypts columns ``start : start + rows`` of x.

        Args:
            out: int32 [rows, N], written.
            operand: x and its scales.
            start: the block's first column of x.
            masks: int32 [rows, d·N].
            keystream: fresh uint8 [6·rows·N], which becomes the noise; overwritten.
            secret: from `transform`.
        """
        ...

    def decrypt(
        self, out: torch.Tensor, column: int, planes: Planes, scales: torch.Tensor, secret: Any
    ) -> None:
        """Decrypts rows of a product into columns ``column : column + rows`` of out.

        Args:
            out: float32 [T, n], T ≤ N.
            column: the first to be written.
            planes: of b' and a'.
            scales: float32 [T].
            secret: from `transform`.
        """
        ...


@dataclass(frozen=True)
class TorchKernels:
    """The reference, and the version where nothing was compiled."""

    name: str = "torch"

    def transform(self, secret: torch.Tensor) -> TransformedSecret:
        """See `Kernels.transform`."""
        return TransformedSecret(secret)

    def encrypt(
        self, out: torch.Tensor, operand: ScaledOperand, start: int, masks: torch.Tensor,
        keystream: torch.Tensor, secret: TransformedSecret,
    ) -> None:  # fmt: skip
        """See `Kernels.encrypt`."""
        halves = (-1, 2, secret.ring_degree // 2)
        noise = centred_binomial(keystream, operand.eta)
        torch.add(secret.dot(masks), noise.view(halves), out=out.view(halves))
        x = operand.x[:, start : start + len(out)]
        out[:, : len(x)] += rounded(x, operand.inverse, operand.x_max)

    def decrypt(
        self, out: torch.Tensor, column: int, planes: Planes, scales: torch.Tensor, secret: TransformedSecret
    ) -> None:
        """See `Kernels.decrypt`."""
        b, high, low = planes
        halves = (b.to(torch.int32) << B_SHIFT).view(-1, 2, secret.ring_degree // 2)
        values = (halves - secret.dot(join_planes(high, low))).reshape(b.shape)[:, : len(out)]
        torch.mul(values.t().to(torch.float32), scales[:, None], out=out[:, column : column + len(b)])


@functools.cache
def kernels() -> Kernels:
    """The compiled version if there is one, else torch's."""
    found = library()
    return TorchKernels() if found is None else NativeKernels(found)
