"""The client's operations on a block of features, and which version of them this machine has.

    token_norms  ‖x_t∘columns‖∞ and ‖x_t∘columns‖₂²
    encrypt      b_k = a_k·s + e_k + round(x_k·column_k / scale) mod q,  c_k = round(b_k / 2^6)
    unpack       u of a result, from 14 bits each to 16
    decrypt      y_j = scale·column_j·(round(u_j·q / 2^14) − (W·a)_j·s mod q, signed)
    check_up     2^6·(R·W)·c mod q
    check_down   R·u mod 2^14

All versions give the same numbers to the bit.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch

from hetrain.secret.activation_quantization import TokenNorms
from hetrain.secret.engines.rlwe.native.ring_library import NativeRing
from hetrain.secret.engines.rlwe.torch_ring import Message, ResultScales, TorchRing


class RingKernels(Protocol):
    """One version of them. Thread-safe. Blocks hold 16 features; the last of a matrix may hold fewer."""

    @property
    def name(self) -> str:
        """For logs."""
        ...

    def spectrum(self, secret: torch.Tensor) -> Any:
        """A secret int8 [d, N] in {−1, 0, 1}, made ready for the other two; it cannot be serialised."""
        ...

    def token_norms(self, x: torch.Tensor, columns: torch.Tensor) -> TokenNorms:
        """The norms of each token of x·diag(columns), float32 [T, K] and [K]."""
        ...

    def encrypt(
        self,
        planes: torch.Tensor,
        first: int,
        masks: torch.Tensor,
        keystream: torch.Tensor,
        message: Message,
        secret: Any,
    ) -> None:
        """Encrypts columns first .. first + 16·blocks of x, all N rows: those from T on carry noise alone.

        Args:
            planes: int8 [3, N, K]: the columns' digits D_0, D_1, D_2 of c are written.
            first: the first column, a multiple of 16.
            masks: int32 [blocks, d·N, 16], transforms of the masks.
            keystream: fresh uint8 [32·blocks·N], two bytes a value: see `torch_ring.noise`.
            message: T ≤ N.
            secret: from `spectrum`.
        """
        ...

    def unpack(self, packed: torch.Tensor, out: torch.Tensor) -> None:
        """Writes u, int16 [N, n] in 0..2^14 − 1, whose rows may be apart.

        Args:
            packed: uint8 [N, 112·⌈n/64⌉]: see `hetrain.public.lattice.result_format`.
            out: the columns of u that a part of the result holds.
        """
        ...

    def decrypt(
        self,
        out: torch.Tensor,
        column: int,
        u: torch.Tensor,
        first: int,
        hint: torch.Tensor,
        scales: ResultScales,
        secret: Any,
    ) -> None:
        """Decrypts columns first .. first + 16·blocks of u.

        Args:
            out: float32 [T, width], T ≤ N: columns from `column` on are written.
            column: where the first column goes.
            u: int16 [N, n], residues modulo 2^14.
            first: the first column of u.
            hint: int32 [blocks, d·N, 16], (W·â)_j mod q of those columns.
            scales: of the tokens and of all columns of `out`.
            secret: from `spectrum`.
        """
        ...

    def check_up(self, image: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
        """2^6·image·c mod q, int32 [rows, N].

        Args:
            image: R·W, int32 [rows, K], entries of at most `LARGEST_IMAGE` in size.
            planes: int8 [3, N, K], from `encrypt`.
        """
        ...

    def check_down(self, rows: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """R·u mod 2^14 in 0..2^14 − 1, int32 [rows, N]; R int8 [rows, n] in {−1, 0, 1}, u int16 [N, n]."""
        ...


@functools.cache
def ring_kernels() -> RingKernels:
    """The compiled version where there is one, else torch's."""
    return NativeRing.best() or TorchRing()
