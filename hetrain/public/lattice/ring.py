"""The ring R_q = Z_q[X]/(X^N + 1) with q = 2^30 − 49151, and its number-theoretic transform (NTT).

q is prime and q ≡ 1 mod 2^14, so for every power of two N ≤ 8192 there is a primitive 2N-th root of unity ψ,
and X^N + 1 = Π_i (X − ψ^(2·brv(i)+1)), where brv(i) reverses the log2 N bits of i. The transform of a is

    â_i = a(ψ^(2·brv(i)+1))    for i < N;

products of polynomials are products point by point. This is the NTT of ML-KEM (FIPS 203, section 4.3),
carried to the last stage. Here in torch's int64; `hetrain.secret.engines.rlwe.native` has it in C.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from hetrain.public.errors import ParameterError

MODULUS = (1 << 30) - 49151
LANES = 16
"""Features side by side in a block of masks or hints: [block][points][lanes], whatever the machine."""
DROPPED_BITS = 6
"""What travels up is c = round(b / 2^6) ..."""
DIGIT_OFFSET = 0x808080
"""... in digits D_l in −128..127: c = Σ_l 2^(8l)·D_l, and c + 0x808080 has the bytes D_l + 128."""
RESULT_BITS = 14
"""What travels down is u = round(b'·2^14 / q) mod 2^14."""
MIN_DEGREE, MAX_DEGREE = 16, 2048


def root_of_unity(degree: int) -> int:
    """ψ = g^((q−1)/2N) for the smallest g ≥ 2 with ψ^N = −1, that is the smallest quadratic non-residue."""
    candidates = (pow(g, (MODULUS - 1) // (2 * degree), MODULUS) for g in range(2, MODULUS))
    return next(psi for psi in candidates if pow(psi, degree, MODULUS) == MODULUS - 1)


@dataclass(frozen=True)
class Roots:
    """Constants of a transform: ψ^brv(i) and ψ^−brv(i), int64 [N]."""

    degree: int
    forward: torch.Tensor
    inverse: torch.Tensor


@functools.cache
def roots(degree: int) -> Roots:
    """The constants for N = `degree`. Raises `ParameterError` unless it is a power of two in 16..2048."""
    if degree not in (1 << bits for bits in range(4, 12)):
        raise ParameterError(f"ring degree {degree} is not a power of two in {MIN_DEGREE}..{MAX_DEGREE}")
    bits = degree.bit_length() - 1
    reversed_bits = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(degree)]
    psi = root_of_unity(degree)
    powers = [pow(psi, exponent, MODULUS) for exponent in range(2 * degree)]
    return Roots(
        degree,
        torch.tensor([powers[i] for i in reversed_bits]),
        torch.tensor([powers[-i] if i else 1 for i in reversed_bits]),
    )


def companions(constants: torch.Tensor) -> torch.Tensor:
    """⌊w·2^32 / q⌋ for each w of int64 [...] in 0..q−1: what lazy products by w need (lanes.h)."""
    return (constants << 32) // MODULUS


def forward(values: torch.Tensor) -> torch.Tensor:
    """The transform of int64 [..., N, lanes] in 0..q−1 along the last dimension but one.

    Cooley and Tukey: each stage splits X^2h − ψ^2e into (X^h − ψ^e)(X^h + ψ^e).
    """
    shape, constants = values.shape, roots(values.shape[-2])
    count = 1
    while count < constants.degree:
        pairs = values.reshape(*shape[:-2], count, 2, -1, shape[-1])
        low = pairs[..., 0, :, :]
        high = pairs[..., 1, :, :] * constants.forward[count : 2 * count, None, None] % MODULUS
        values = torch.stack((low + high, low - high), dim=-3) % MODULUS
        count *= 2
    return values.reshape(shape)


def inverse(values: torch.Tensor) -> torch.Tensor:
    """The polynomials int64 [..., N, lanes] whose transform is `values`. Gentleman and Sande."""
    shape, constants = values.shape, roots(values.shape[-2])
    count = constants.degree
    while count > 1:
        count //= 2
        pairs = values.reshape(*shape[:-2], count, 2, -1, shape[-1])
        low, high = pairs[..., 0, :, :], pairs[..., 1, :, :]
        difference = (low - high) * constants.inverse[count : 2 * count, None, None]
        values = torch.stack((low + high, difference), dim=-3) % MODULUS
    return values.reshape(shape) * pow(constants.degree, -1, MODULUS) % MODULUS
