"""Client half of `rlwe`: encrypts a matrix of tokens, verifies and decrypts the product with a public matrix.

Feature k of all T tokens is one polynomial m_k(X) = Σ_t m[t,k]·X^t of R_q = Z_q[X]/(X^N + 1), and

    b_k = a_k·s + e_k + m_k  mod q          a_k public, the same in every job; s, e_k fresh for every matrix
    c_k = round(b_k / 2^6)                  travels, in three digits
    u_j = round((W·2^6·c)_j·2^14 / q)       comes back
    y_j = u_j·q / 2^14 − (W·a)_j·s          = (W·m)_j + errors, without a wrap; W·a is the hint

Rule 1 of the security parameters is kept by construction: `seal` is the only place that draws a secret, it
encrypts one matrix under it, and the secret leaves it only inside the `Opening`, which cannot encrypt.
Rule 7: `open` decrypts what `check` has verified, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hetrain.public.lattice.bounds import operand_bound
from hetrain.public.lattice.header import RlweHeader
from hetrain.public.lattice.parameters import SLOTS, ParameterSet, parameters_for
from hetrain.public.lattice.result_format import GROUP, ResultFormat
from hetrain.public.lattice.ring import LANES
from hetrain.public.lattice.uniform_masks import MaskBlocks
from hetrain.public.model.quantization import Scales
from hetrain.public.protocol.messages import EngineHeader, Header
from hetrain.public.protocol.product import Operand, Part, Product
from hetrain.public.workspace import unaligned_empty, workspace
from hetrain.secret.activation_quantization import largest_entry, token_scales
from hetrain.secret.engines.rlwe.hints import Hint, HintStore
from hetrain.secret.engines.rlwe.ring_kernels import ring_kernels
from hetrain.secret.engines.rlwe.torch_ring import Message, ResultScales
from hetrain.secret.randomness import SecretStream, sample_ternary
from hetrain.secret.verification.job import Verification
from hetrain.secret.verification.parts import PartsCheck
from hetrain.secret.verification.rows import CheckRows
from hetrain.secret.verification.verdict import is_near

_BLOCK = (SLOTS, LANES)
_OPENED_AT_ONCE = 1024
"""Features: they bound the memory of the reference, whose words have 64 bits."""


@dataclass(frozen=True)
class RlweClaim:
    """u must be the product of a ciphertext: see `hetrain.secret.verification.parts.Claim`.

    Attributes:
        planes: c, int8 [3, N, K], as it travelled.
        result_format: of the results.
        rows: draws rows R and R·W.
        rows_for: makes new rows for a range of W.
    """

    planes: torch.Tensor
    result_format: ResultFormat
    rows: Callable[[], CheckRows]
    rows_for: Callable[[torch.Tensor], CheckRows]

    def read(self, part: Part) -> torch.Tensor:
        """u of the part's rows, int16 [N, n]."""
        packed = self.result_format.read_result(part.data, part.n, where=part.worker)
        u = unaligned_empty((len(packed), part.n), torch.int16)
        ring_kernels().unpack(packed, u)
        return u

    def holds(self, rows: CheckRows, results: Sequence[torch.Tensor]) -> bool:
        """See `hetrain.secret.verification.verdict.is_near`."""
        expected = ring_kernels().check_up(rows.image, self.planes)
        widths = [u.shape[1] for u in results]
        pieces = rows.values.split(widths, dim=1)
        claimed = sum(
            ring_kernels().check_down(piece.contiguous(), u) for piece, u in zip(pieces, results, strict=True)
        )
        return is_near(expected, torch.as_tensor(claimed), rows.weights)


@dataclass(frozen=True, repr=False)
class RlweOpening:
    """The secret of one ciphertext matrix and the scales of its results: see `hetrain.secret.engine`."""

    parts: PartsCheck[CheckRows, torch.Tensor]
    hint: Hint
    secret: Any
    scales: ResultScales

    def check(self, part: Part) -> None:
        """Verifies the product once it is complete."""
        self.parts.add(part)

    def open(self) -> torch.Tensor:
        """Y = X·Wᵀ, float32 [T, n]."""
        verified = self.parts.results()
        y = unaligned_empty((len(self.scales.tokens), verified[-1].rows[1]), torch.float32)
        hint = self.hint.mapped()
        for each in verified:
            start, stop = each.rows
            for first in range(start, stop, _OPENED_AT_ONCE):
                blocks = hint[first // LANES : -(-min(first + _OPENED_AT_ONCE, stop) // LANES)]
                ring_kernels().decrypt(y, first, each.values, first - start, blocks, self.scales, self.secret)
        return y


@dataclass(frozen=True, repr=False)
class RlweSealed:
    """A ciphertext matrix: the digits of c as int8 [3, N, K]; its header is a `RlweHeader`."""

    operand: Operand
    opening: RlweOpening


@dataclass(frozen=True)
class RlweSealer:
    """See `hetrain.secret.engine.Sealer`. A job has no keys: every ciphertext matrix has its own secret.

    Attributes:
        verification: rows that check results.
        hints: the store of products with the masks; those of the job's products must be there.
        bits: limits the operand's precision; None takes all that fits.
    """

    verification: Verification
    hints: HintStore
    bits: int | None = None

    @property
    def setup(self) -> Header:
        """Empty."""
        return EngineHeader().to_wire()

    def for_micro_batch(self) -> RlweSealer:
        """Itself."""
        return self

    def seal(self, x: torch.Tensor, product: Product, channels: Scales | None = None) -> RlweSealed:
        """Encrypts X under a fresh secret; see `hetrain.secret.engine.Sealer.seal`.

        Token t takes coefficient t; the coefficients from T on carry noise alone.
        """
        parameters = parameters_for(x.shape[0])
        x = x.detach().to(device="cpu", dtype=torch.float32).contiguous()
        channels = channels or Scales(torch.ones(product.n), torch.ones(product.k))
        norms = ring_kernels().token_norms(x, channels.inputs)
        scales = token_scales(norms, operand_bound(product.norms, product.n), self.bits)
        message = Message(x, channels.inputs, scales.reciprocal(), largest_entry(self.bits))
        secret, hint = _fresh_secret(parameters), self.hints.hint(product)
        planes = encrypt(message, hint, secret, parameters)
        result_format = ResultFormat(parameters)
        claim = RlweClaim(planes, result_format, *self.verification.rows_of(product))
        parts = PartsCheck(product, claim, self.verification.weights)
        header = RlweHeader(parameters=parameters.name, operand="ciphertext")
        return RlweSealed(
            Operand(
                header.to_wire(),
                [planes.numpy().data.cast("B")],
                result_bytes=result_format.result_bytes(product.n),
                row_step=GROUP,
            ),
            RlweOpening(parts, hint, secret, ResultScales(scales, channels.outputs)),
        )


def _fresh_secret(parameters: ParameterSet) -> Any:
    values = sample_ternary(SecretStream("hetrain.secret"), parameters.dimension)
    return ring_kernels().spectrum(values.view(parameters.rank, parameters.ring_degree))


def encrypt(message: Message, hint: Hint, secret: Any, parameters: ParameterSet) -> torch.Tensor:
    """c_k = round((a_k·s + e_k + m_k mod q) / 2^6), in three digits.

    The caller owns rule 1: this (mask, secret) pair must never have met another message.

    Args:
        message: m, [T, K], T ≤ N.
        hint: its seed expands to the masks a_k.
        secret: s [d, N], from `RingKernels.spectrum`.
        parameters: N and d.

    Returns:
        int8 [3, N, K].
    """
    k, degree = message.x.shape[1], parameters.ring_degree
    mask_blocks, noise_stream = MaskBlocks(hint.seed), SecretStream("hetrain.noise")
    planes = unaligned_empty((3, degree, k), torch.int8)
    # Those of a group stay within a core's cache.
    all_masks = workspace("masks", (GROUP // LANES, *_BLOCK), torch.int32)
    all_keystream = workspace("keystream", (2 * GROUP * degree,), torch.uint8)
    for first in range(0, k, GROUP):
        count = -(-min(GROUP, k - first) // LANES)
        masks, keystream = all_masks[:count], all_keystream[: 2 * LANES * count * degree]
        mask_blocks.fill(masks, first // LANES)
        noise_stream.fill(keystream)
        ring_kernels().encrypt(planes, first, masks, keystream, message, secret)
    return planes
