"""A file for what does not fit in memory: nobody can read it but this process, and it ends with it."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import IO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import GCM

from hetrain.public.disk import reason_of
from hetrain.public.errors import StorageError
from hetrain.public.model.files import cache_directory

_KEY_BYTES, _NONCE_BYTES = 32, 12
_MOST_BYTES = 1 << 30
"""OpenSSL takes less than 2 GB at once."""
_HINT = "check the disk that HETRAIN_CACHE is on, or have `activation_memory` hold all of it"


@dataclass(frozen=True)
class Extent:
    """A stretch of the file: where it begins, its bytes, and what it is opened with."""

    offset: int
    size: int
    nonce: bytes
    tag: bytes


class EncryptedFile:
    """A file without a name in the cache directory, encrypted with AES-256-GCM under a key in memory alone.

    What is left on the disk tells nothing but sizes. Every write has a nonce of its own (a counter), so a
    stretch may be written to again.
    """

    def __init__(self) -> None:
        self._key, self._writes = AES256(os.urandom(_KEY_BYTES)), count()

    def write(self, values: memoryview, offset: int) -> Extent:
        """Writes bytes, which are lost: their memory holds the ciphertext then.

        Raises:
            OSError: there is no room, or the disk fails; `values` are what they were.
        """
        nonce = next(self._writes).to_bytes(_NONCE_BYTES, "big")
        encryptor = Cipher(self._key, GCM(nonce)).encryptor()
        file = self._file.fileno()
        _update(encryptor, values)
        extent = Extent(offset, len(values), nonce, encryptor.tag)
        try:
            rest = values
            while rest:
                written = os.pwrite(file, rest, offset + len(values) - len(rest))
                rest = rest[written:]
        except OSError:
            self._decrypt(extent, values)
            raise
        return extent

    def read(self, extent: Extent, values: memoryview) -> None:
        """Reads what was written into `values`, as many bytes.

        Raises:
            StorageError: it cannot be read, or is not what was written.
        """
        rest = values
        try:
            while rest:
                begin = extent.offset + len(values) - len(rest)
                if not (n_read := os.preadv(self._file.fileno(), [rest], begin)):
                    raise StorageError("a scratch file has been cut short", hint=_HINT)
                rest = rest[n_read:]
            self._decrypt(extent, values)
        except OSError as error:
            raise StorageError(f"a scratch file cannot be read: {reason_of(error)}", hint=_HINT) from error
        except InvalidTag as error:
            raise StorageError("a scratch file has other bytes than were written", hint=_HINT) from error

    def _decrypt(self, extent: Extent, values: memoryview) -> None:
        _update(Cipher(self._key, GCM(extent.nonce, extent.tag)).decryptor(), values)

    @cached_property
    def _file(self) -> IO[bytes]:
        directory = cache_directory()
        directory.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=directory)


def _update(context: CipherContext, values: memoryview) -> None:
    """Encrypts or decrypts in place, to the end."""
    for begin in range(0, len(values), _MOST_BYTES):
        part = values[begin : begin + _MOST_BYTES]
        context.update_into(part, part)
    context.finalize()
