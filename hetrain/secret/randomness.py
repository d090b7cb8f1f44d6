"""Secrets and noise, from a generator of their own.

`SecretStream` draws a fresh 256-bit key from the operating system for every ciphertext and takes no seed, so
it can neither be replayed nor be fed with anything public. Its state is never stored; a fork inherits at most
a stream that is about to be used up. Keystream: AES-256-CTR (about 7 GB/s with AES instructions).
"""

from __future__ import annotations

import hashlib
import secrets

import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

_ZEROS = memoryview(bytes(1 << 20))
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
        self.fill(out)
        return out

    def fill(self, out: torch.Tensor) -> None:
        """Overwrites `out`, uint8 [n], with the next n bytes of the stream."""
        view = out.numpy().data
        for start in range(0, len(view), len(_ZEROS)):
            piece = view[start : start + len(_ZEROS)]
            self._encryptor.update_into(_ZEROS[: len(piece)], piece)


def sample_ternary(stream: SecretStream, count: int) -> torch.Tensor:
    """`count` independent uniform values of {-1, 0, 1}, as int8; see `ternary`."""
    values = ternary(stream.take(count + count // 64 + 64))
    while values.numel() < count:
        values = torch.cat([values, ternary(stream.take(count))])
    return values[:count]


def ternary(keystream: torch.Tensor) -> torch.Tensor:
    """Uniform bytes to uniform values of {-1, 0, 1}: (byte mod 3) - 1, as int8, without the bytes of 255.

    Unbiased, since 255 = 3·85. Whether a byte is rejected says nothing of those kept.
    """
    kept = keystream[keystream < 255].to(torch.int32)
    # ⌊171·x / 2^9⌋ = ⌊x / 3⌋ for bytes; the time of a division may depend on its operands.
    return (kept - 3 * ((171 * kept) >> 9) - 1).to(torch.int8)


def centred_binomial(keystream: torch.Tensor, eta: int) -> torch.Tensor:
    """Uniform bytes to independent values (sum of eta bits) - (sum of eta bits): |e| ≤ eta, variance eta/2.

    Constant time: bits are counted eight values at a time in 64-bit words.

    Args:
        keystream: uint8 [6·n], n a multiple of 8, overwritten. Seen as [2, 3, n], column i holds the bytes of
            value i; the first eta bits of each side's three bytes, lowest bits first, are counted.
        eta: 1..21.

    Returns:
        int8 [n]: ones of side 0 minus ones of side 1.
    """
    words = keystream.view(torch.int64).view(2, _CBD_BYTES_PER_SIDE, -1)
    for position in range(_CBD_BYTES_PER_SIDE):
        width = min(max(eta - 8 * position, 0), 8)
        if width < 8:
            words[:, position] &= _lanes((1 << width) - 1)
    # In place with one scratch array: ones per pair of bits, per nibble, per byte lane.
    scratch = torch.bitwise_right_shift(words, 1)
    scratch &= _lanes(0x55)
    words -= scratch
    torch.bitwise_right_shift(words, 2, out=scratch)
    scratch &= _lanes(0x33)
    words &= _lanes(0x33)
    words += scratch
    nibbles = words[:, 0] + words[:, 1] + words[:, 2]  # at most 12 each
    counts = (nibbles & _lanes(0x0F)) + ((nibbles >> 4) & _lanes(0x0F))
    ones = counts.view(torch.int8)
    return ones[0] - ones[1]


def _lanes(byte: int) -> int:
    """`byte` in each of eight lanes, as a signed 64-bit integer."""
    value = byte * 0x0101010101010101
    return value - (1 << 64) if value >= 1 << 63 else value
