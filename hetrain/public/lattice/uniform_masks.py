"""Public masks: uniform words of Z_q, sampled in the transform's domain.

The mask of feature k is 2048 words: the transforms of d polynomials of degree N, for every N·d = 2048.
Sixteen features make a block, [2048 points][16 lanes], and every block has its own stream, so that blocks can
be made in any order and in parallel:

    key     BLAKE2b-256(seed, person = "hetrain.mask.v2")
    stream  AES-256-CTR under key; the first counter of block i is i·2^64, big-endian (NIST SP 800-38A)
    words   32 bits each, little-endian; word mod 2^30 is taken if it is below q, in the stream's order

Rejection is that of FIPS 203, SampleNTT. Masks are public, so its time may show which words were rejected.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from hetrain.public import compiled
from hetrain.public.compiled import require
from hetrain.public.lattice.masks import PublicSeed
from hetrain.public.lattice.parameters import SLOTS
from hetrain.public.lattice.ring import LANES, MODULUS

_INTERFACE = 2
_SPARE = 64
"""Words drawn beyond those wanted: of a block's 2^15 one or two are rejected."""
_MOST_WORDS = SLOTS * LANES + _SPARE
_ZEROS = memoryview(bytes(4 * _MOST_WORDS))


class MaskBlocks:
    """Masks of one seed, block by block, into memory of one's own. Not for two threads at once."""

    def __init__(self, seed: PublicSeed) -> None:
        key = hashlib.blake2b(seed.value, digest_size=32, person=b"hetrain.mask.v2").digest()
        self._encryptor = Cipher(AES(key), CTR(bytes(16))).encryptor()
        self._stream = np.empty(_MOST_WORDS, np.uint32)

    def fill(self, out: torch.Tensor, first: int) -> None:
        """Overwrites `out`, contiguous int32 [blocks, 2048, 16], with blocks `first`, `first` + 1, ..."""
        require(out.dtype == torch.int32, out.shape[1:] == (SLOTS, LANES), out.is_contiguous())
        for index, words in enumerate(out.numpy().view(np.uint32).reshape(len(out), -1), first):
            self._encryptor.reset_nonce(index.to_bytes(8, "big") + bytes(8))
            while words.size:
                stream = self._stream[: words.size + _SPARE]
                self._encryptor.update_into(_ZEROS[: stream.nbytes], stream.data.cast("B"))
                words = words[accept(stream, words) :]


def expand_masks(seed: PublicSeed, features: int) -> torch.Tensor:
    """The masks of `features` features: int32 [⌈features/16⌉, 2048, 16], words in 0..q−1."""
    out = torch.empty(-(-features // LANES), SLOTS, LANES, dtype=torch.int32)
    MaskBlocks(seed).fill(out, 0)
    return out


def accept(stream: npt.NDArray[np.uint32], out: npt.NDArray[np.uint32]) -> int:
    """Copies accepted words of `stream`, reduced to 30 bits, to `out` until it is full; returns how many."""
    found = _library()
    if found is not None:
        return int(found.hetrain_accept(stream.ctypes.data, stream.size, out.ctypes.data, out.size))
    words = stream & ((1 << 30) - 1)
    accepted = words[words < MODULUS][: out.size]
    out[: accepted.size] = accepted
    return accepted.size


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = compiled.load(Path(__file__).parent / "native", "_masks", _INTERFACE)
    if found is not None:
        found.hetrain_accept.argtypes = [ctypes.c_void_p, ctypes.c_size_t] * 2
        found.hetrain_accept.restype = ctypes.c_size_t
    return found
