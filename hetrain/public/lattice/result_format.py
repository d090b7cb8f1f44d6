"""Layout and sizes of what `rlwe` sends: operands, results and hints.

up      c     int8  [3, N, K]               three planes of signed 8-bit digits (ring.py)
down    u     uint8 [N, ⌈n/64⌉, 112]        residues modulo 2^14, 64 features in 112 bytes
hint    H     int32 [⌈n/16⌉, 2048, 16]      W·â mod q, as masks lie (uniform_masks.py); zero from feature n on

112 bytes are u >> 6 of 64 features in their order, and then their low six bits: with a, b, c and d those of
features 0..15, 16..31, 32..47 and 48..63, 16 bytes a | b << 6, 16 bytes b >> 2 | c << 4 and 16 bytes
c >> 4 | d << 2, all modulo 2^8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hetrain.public.errors import WireError
from hetrain.public.lattice.masks import SEED_BYTES, PublicSeed
from hetrain.public.lattice.parameters import SLOTS, ParameterSet
from hetrain.public.lattice.ring import LANES, RESULT_BITS

DIGITS = 3
"""Planes of an operand."""
GROUP = 64
"""Features of a result that are packed together; the last group is filled up with zeros."""
GROUP_BYTES = GROUP * RESULT_BITS // 8
LOW_BITS = RESULT_BITS - 8


@dataclass(frozen=True)
class ResultFormat:
    """Sizes of operands and results under one parameter set.

    Attributes:
        parameters: N and d.
    """

    parameters: ParameterSet

    def operand_bytes(self, k: int) -> int:
        """Bytes of an operand of k features."""
        return DIGITS * self.parameters.ring_degree * k

    def result_bytes(self, n: int) -> int:
        """Bytes of a result of n features, that is of n rows of W."""
        return self.parameters.ring_degree * packed_bytes(n)

    def read_operand(self, payload: memoryview, k: int, *, where: str) -> torch.Tensor:
        """The digit planes, int8 [3, N, k]. Raises `WireError` unless the payload has as many bytes."""
        _require_size("operand", payload, self.operand_bytes(k), where)
        return torch.frombuffer(payload, dtype=torch.int8).view(DIGITS, -1, k)

    def read_result(self, data: memoryview, n: int, *, where: str) -> torch.Tensor:
        """u, packed: uint8 [N, 112·⌈n/64⌉]. Raises `WireError` unless the data has as many bytes."""
        _require_size("result", data, self.result_bytes(n), where)
        return torch.frombuffer(data, dtype=torch.uint8).view(-1, packed_bytes(n))


def packed_bytes(n: int) -> int:
    """Bytes of one token's n features in a result."""
    return GROUP_BYTES * -(-n // GROUP)


def hint_bytes(n: int) -> int:
    """Bytes of the hint of n rows of W."""
    return 4 * SLOTS * LANES * -(-n // LANES)


def read_seed(payload: memoryview, *, where: str) -> PublicSeed:
    """The operand of a hint. Raises `WireError` unless it has 32 bytes."""
    _require_size("mask seed", payload, SEED_BYTES, where)
    return PublicSeed(bytes(payload))


def read_hint(data: memoryview, n: int, *, where: str) -> torch.Tensor:
    """H, int32 [⌈n/16⌉, 2048, 16]. Raises `WireError` unless the data has as many bytes."""
    _require_size("hint", data, hint_bytes(n), where)
    return torch.frombuffer(data, dtype=torch.int32).view(-1, SLOTS, LANES)


def require_units(nbytes: int, unit: int, most: int, *, where: str) -> None:
    """Raises `WireError` unless an operand has a positive multiple of `unit` bytes, `most` at most."""
    if not 0 < nbytes <= most or nbytes % unit:
        raise WireError(
            f"the operand has {nbytes} bytes, no multiple of {unit} of at most {most}", where=where
        )


def _require_size(what: str, data: memoryview, expected: int, where: str) -> None:
    require_bytes(what, data.nbytes, expected, where=where)


def require_bytes(what: str, nbytes: int, expected: int, *, where: str) -> None:
    """Raises `WireError` unless `what` has as many bytes as expected."""
    if nbytes != expected:
        raise WireError(f"the {what} has {nbytes} bytes, not {expected}", where=where)


def pack(u: torch.Tensor) -> torch.Tensor:
    """The bytes of a result: uint8 [N, 112·⌈n/64⌉] from integers u [N, n], of which the low 14 bits count."""
    tokens, n = u.shape
    groups = torch.nn.functional.pad(u, (0, -n % GROUP)).view(tokens, -1, 4, GROUP // 4)
    a, b, c, d = (groups & ((1 << LOW_BITS) - 1)).unbind(dim=2)
    rest = torch.stack((a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2), dim=2)
    return (torch.cat((groups >> LOW_BITS, rest), dim=2) & 0xFF).to(torch.uint8).view(tokens, -1)


def unpack(packed: torch.Tensor, n: int) -> torch.Tensor:
    """u, int16 [N, n] in 0..2^14 − 1, from uint8 [N, 112·⌈n/64⌉]."""
    groups = packed.to(torch.int16).view(len(packed), -1, GROUP_BYTES)
    high, x, y, z = groups.split((GROUP, GROUP // 4, GROUP // 4, GROUP // 4), dim=2)
    low = torch.cat((x & 63, x >> 6 | (y & 15) << 2, y >> 4 | (z & 3) << 4, z >> 2), dim=2)
    u: torch.Tensor = (high << LOW_BITS | low).flatten(1)[:, :n]
    return u
