"""Public masks: the uniform polynomials a_k of a ciphertext, expanded from a 256-bit seed.

Masks are public. Their generator is a type of its own, so that no seed sent over the wire can ever feed the
generator of secrets and noise (`hetrain.secret.randomness`).
"""

from __future__ import annotations

import hashlib
import re
import secrets
import sys
from dataclasses import dataclass

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from hetrain.public.errors import WireError

if sys.byteorder != "little":
    raise ImportError("hetrain needs a little-endian machine: keystream and wire formats are little-endian")

SEED_BYTES = 32
_HEX_SEED = re.compile(f"[0-9a-f]{{{2 * SEED_BYTES}}}")
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

    @staticmethod
    def from_hex(text: object) -> PublicSeed:
        """Parses 64 lower-case hexadecimal digits. Raises `WireError` for anything else."""
        # bytes.fromhex alone would skip blanks and so give one seed many spellings.
        if not isinstance(text, str) or not _HEX_SEED.fullmatch(text):
            raise WireError(f"a mask seed must be a string of {2 * SEED_BYTES} hexadecimal digits")
        return PublicSeed(bytes.fromhex(text))

    def hex(self) -> str:
        return self.value.hex()


def _write_keystream(encryptor: CipherContext, out: memoryview) -> None:
    """Fills `out`, bytes, with what comes next of an AES-CTR keystream."""
    for start in range(0, len(out), len(_ZEROS)):
        piece = out[start : start + len(_ZEROS)]
        encryptor.update_into(_ZEROS[: len(piece)], piece)


def keystream(key: bytes, nbytes: int) -> bytearray:
    """The first `nbytes` of AES-256-CTR under `key`, counter from 0 (NIST SP 800-38A)."""
    out = bytearray(nbytes)
    _write_keystream(_encryptor(key), memoryview(out))
    return out


def _encryptor(key: bytes) -> CipherContext:
    return Cipher(AES(key), CTR(bytes(16))).encryptor()


def _key(seed: PublicSeed) -> bytes:
    return hashlib.blake2b(seed.value, digest_size=32, person=b"hetrain.mask.v1").digest()


class MaskStream:
    """The mask of `expand_mask`, row after row, into memory of one's own."""

    def __init__(self, seed: PublicSeed) -> None:
        self._encryptor = _encryptor(_key(seed))

    def fill(self, out: torch.Tensor) -> None:
        """Overwrites `out`, contiguous int32 [rows, dimension], with the next rows of the mask."""
        _write_keystream(self._encryptor, out.numpy().data.cast("B"))


def expand_mask(seed: PublicSeed, polynomials: int, dimension: int) -> torch.Tensor:
    """The mask of a ciphertext matrix: `polynomials` × `dimension` uniform words of Z_{2^32}.

    Word i is bytes 4i..4i+3, little-endian, of AES-256-CTR under key = BLAKE2b-256(seed, "hetrain.mask.v1").

    Returns:
        int32 tensor [polynomials, dimension] on the CPU; row k holds the d polynomials of a_k side by side.
    """
    words = keystream(_key(seed), 4 * polynomials * dimension)
    return torch.frombuffer(words, dtype=torch.int32).view(polynomials, dimension)
