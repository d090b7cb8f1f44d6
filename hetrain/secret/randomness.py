"""Secrets and noise, from a generator of their own.

`SecretStream` draws a fresh 256-bit key from the operating system for every ciphertext and takes no seed, so it
can neither be replayed nor be fed with anything public. Its state is never stored; a fork inherits at most a
stream that is about to be used up. Keystream: AES-256-CTR (about 7 GB/s with AES instructions).
"""

from __future__ import annotations

import hashlib
import secrets

import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

_ZEROS = bytes(1 << 20)
# CBD with eta = 21 takes 42 of 48 bits: bytes of 8, 8 and 5 bits for each side.
_CBD_BYTES_PER_SIDE = 3


class SecretStream:
    """A cryptographic keystream under a fresh key; `role` separates uses of one ciphertext."""

    def __init__(self, role: str) -> None:
        root = secrets.token_bytes(32)
        key = hashlib.blake2b(root, digest_size=32, person=role.encode()[:16].ljust(16, b"\0")).digest()
        self._encryptor = Cipher(AES(key), CTR(bytes(16))).encryptor()

    def take(self, nbytes: int) -> torch.Tensor:
        """The next `nbytes` of the stream, as uint8 [nbytes]."""
        out = torch.empty(nbytes, dtype=torch.uint8)
        view = memoryview(out.numpy())
        for start in range(0, nbytes, len(_ZEROS)):
            piece = view[start : start + len(_ZEROS)]
            self._encryptor.update_into(memoryview(_ZEROS)[: len(piece)], piece)
        return out


def sample_ternary(stream: SecretStream, count: int) -> torch.Tensor:
    """`count` independent uniform values of {-1, 0, 1}, as int8.

    Unbiased: bytes of 255 are rejected, and 255 = 3·85. Whether a byte is rejected says nothing of those kept.
    """
    kept = torch.empty(0, dtype=torch.uint8)
    while kept.numel() < count:
        fresh = stream.take(count + 64)
        kept = torch.cat([kept, fresh[fresh < 255]])
    return (kept[:count] % 3).to(torch.int8) - 1


def sample_centred_binomial(stream: SecretStream, count: int, eta: int) -> torch.Tensor:
    """`count` independent values of (sum of eta bits) - (sum of eta bits), as int8; constant time.

    |e| ≤ eta, variance eta/2. Bits are counted eight lanes at a time in 64-bit words.

    Args:
        stream: keystream; 6·count bytes are taken.
        count: how many.
        eta: 1..21.
    """
    lanes = count + (-count % 8)
    bits = stream.take(2 * _CBD_BYTES_PER_SIDE * lanes).view(torch.int64).view(2, _CBD_BYTES_PER_SIDE, -1)
    sides = [_count_bits(bits[side], eta) for side in (0, 1)]
    return (sides[0].view(torch.int8) - sides[1].view(torch.int8))[:count]


def _count_bits(planes: torch.Tensor, eta: int) -> torch.Tensor:
    """Per byte lane, the number of ones among the first eta bits of three planes: int64 [3, n] -> int64 [n]."""
    nibbles = torch.zeros_like(planes[0])
    for position, plane in enumerate(planes):
        width = min(max(eta - 8 * position, 0), 8)
        x = plane & _lanes((1 << width) - 1)
        x -= (x >> 1) & _lanes(0x55)
        nibbles += (x & _lanes(0x33)) + ((x >> 2) & _lanes(0x33))
    return (nibbles & _lanes(0x0F)) + ((nibbles >> 4) & _lanes(0x0F))


def _lanes(byte: int) -> int:
    """`byte` in each of eight lanes, as a signed 64-bit integer."""
    value = byte * 0x0101010101010101
    return value - (1 << 64) if value >= 1 << 63 else value
