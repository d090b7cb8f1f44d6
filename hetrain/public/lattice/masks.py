"""Public masks: the uniform polynomials a_k of a ciphertext, expanded from a 256-bit seed.

Masks are public. Their generator is a type of its own, so that no seed sent over the wire can ever feed the
generator of secrets and noise (`hetrain.secret.randomness`).
"""

from __future__ import annotations

import hashlib
import secrets
import sys
from dataclasses import dataclass

import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from hetrain.public.errors import WireError

if sys.byteorder != "little":
    raise ImportError("hetrain needs a little-endian machine: keystream and wire formats are little-endian")

SEED_BYTES = 32
_ZEROS = memoryview(bytes(1 << 20))


@dataclass(frozen=True)
class PublicSeed:
    """256 public bits that fix the mask of one ciphertext."""

    value: bytes

    def __post_init__(self) -> None:
        if not isinstance(self.value, bytes) or len(self.value) != SEED_BYTES:
            raise WireError(f"a mask seed must be {SEED_BYTES} bytes")

    @staticmethod
    def fresh() -> PublicSeed:
        """A seed from the operating system's generator."""
        return PublicSeed(secrets.token_bytes(SEED_BYTES))

    def hex(self) -> str:
        return self.value.hex()


class MaskStream:
    """The mask of `expand_mask`, row after row, into memory of the caller's."""

    def __init__(self, seed: PublicSeed) -> None:
        key = hashlib.blake2b(seed.value, digest_size=32, person=b"hetrain.mask.v1").digest()
        self._encryptor = Cipher(AES(key), CTR(bytes(16))).encryptor()

    def fill(self, out: torch.Tensor) -> None:
        """Overwrites `out`, contiguous int32 [rows, dimension], with the next rows of the mask."""
        view = out.numpy().data.cast("B")
        for start in range(0, len(view), len(_ZEROS)):
            piece = view[start : start + len(_ZEROS)]
            self._encryptor.update_into(_ZEROS[: len(piece)], piece)


def expand_mask(seed: PublicSeed, polynomials: int, dimension: int) -> torch.Tensor:
    """The mask of a ciphertext matrix: `polynomials` × `dimension` uniform words of Z_{2^32}.

    Word i is bytes 4i..4i+3, little-endian, of AES-256-CTR (counter from 0, NIST SP 800-38A) under
    key = BLAKE2b-256(seed, "hetrain.mask.v1").

    Returns:
        int32 tensor [polynomials, dimension] on the CPU; row k holds the d polynomials of a_k side by side.
    """
    mask = torch.empty(polynomials, dimension, dtype=torch.int32)
    MaskStream(seed).fill(mask)
    return mask
