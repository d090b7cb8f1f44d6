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
