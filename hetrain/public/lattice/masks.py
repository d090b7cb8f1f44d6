"""The seed of public masks (uniform_masks.py).

It is a type of its own, so that no seed sent over the wire can ever feed the generator of secrets and noise
(`hetrain.secret.randomness`).
"""

from __future__ import annotations

import secrets
import sys
from dataclasses import dataclass

from hetrain.public.errors import WireError

if sys.byteorder != "little":
    raise ImportError("hetrain needs a little-endian machine: keystream and wire formats are little-endian")

SEED_BYTES = 32


@dataclass(frozen=True)
class PublicSeed:
    """256 public bits that fix masks. Raises `WireError` for any other length."""

    value: bytes

    def __post_init__(self) -> None:
        if not isinstance(self.value, bytes) or len(self.value) != SEED_BYTES:
            raise WireError(f"a mask seed must be {SEED_BYTES} bytes")

    @staticmethod
    def fresh() -> PublicSeed:
        """A seed from the operating system's generator."""
        return PublicSeed(secrets.token_bytes(SEED_BYTES))
