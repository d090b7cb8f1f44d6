"""The exact ring in plain Python integers, as the definitions say: slow, and obviously right."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from operator import mul

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

Q = 1073692673
LANES, SLOTS = 16, 2048
LEVELS = 2**14
"""Values of what travels down."""

Polynomial = list[int]


def root(degree: int) -> int:
    """ψ = g^((q−1)/2N) for the smallest g ≥ 2 with ψ^N = −1."""
    for g in range(2, Q):
        psi = pow(g, (Q - 1) // (2 * degree), Q)
        if pow(psi, degree, Q) == Q - 1:
            return psi
    raise AssertionError("there is always one")


def points(degree: int) -> list[int]:
    """ψ^(2·brv(i)+1), where polynomials are evaluated."""
    bits = degree.bit_length() - 1
    return [pow(root(degree), 2 * int(f"{i:0{bits}b}"[::-1], 2) + 1, Q) for i in range(degree)]


def transform(a: Sequence[int]) -> Polynomial:
    """a(ψ^(2·brv(i)+1)) for every i, by Horner's rule."""
    values = []
    for x in points(len(a)):
        value = 0
        for coefficient in reversed(a):
            value = (value * x + coefficient) % Q
        values.append(value)
    return values


def inverse(values: Sequence[int]) -> Polynomial:
    """a_j = N^-1·Σ_i â_i·x_i^-j for the points x_i."""
    degree = len(values)
    reciprocals = [pow(x, -1, Q) for x in points(degree)]
    scale = pow(degree, -1, Q)
    terms, a = list(values), []
    for _ in range(degree):
        a.append(sum(terms) * scale % Q)
        terms = [term * x % Q for term, x in zip(terms, reciprocals, strict=True)]
    return a


def product(a: Sequence[int], b: Sequence[int]) -> Polynomial:
    """a·b modulo X^N + 1 and q: c_k = Σ_i ±a_i·b_(k−i), minus where k − i wraps around."""
    n = len(a)
    unrolled = [*(-value for value in b), *b]
    return [sum(map(mul, a, unrolled[n + k : k : -1])) % Q for k in range(n)]


def mask_block(seed: bytes, index: int) -> list[list[int]]:
    """Block `index` of a seed's masks, [2048 points][16 lanes]."""
    key = hashlib.blake2b(seed, digest_size=32, person=b"hetrain.mask.v2").digest()
    encryptor = Cipher(AES(key), CTR((index << 64).to_bytes(16, "big"))).encryptor()
    accepted: list[int] = []
    while len(accepted) < SLOTS * LANES:
        word = int.from_bytes(encryptor.update(bytes(4)), "little") % 2**30
        if word < Q:
            accepted.append(word)
    return [accepted[point * LANES : (point + 1) * LANES] for point in range(SLOTS)]


def masked(masks: Sequence[int], secret: Sequence[Sequence[int]]) -> Polynomial:
    """Σ_i a_i·s_i from the transforms of a_0, a_1, ..., side by side."""
    degree = len(secret[0])
    total = [0] * degree
    for i, s in enumerate(secret):
        one = product(inverse(masks[i * degree : (i + 1) * degree]), s)
        total = [(x + y) % Q for x, y in zip(total, one, strict=True)]
    return total


def noise(two_bytes: bytes) -> int:
    """Ones of the first byte minus ones of the second."""
    return two_bytes[0].bit_count() - two_bytes[1].bit_count()


def scaled(x: float, factor: float, limit: int) -> int:
    """round(x·factor) of float32 numbers, half to even, no further than `limit` from zero."""
    return max(-limit, min(limit, round(float(np.float32(x) * np.float32(factor)))))


def digits(b: int) -> tuple[int, int, int]:
    """Signed digits of c = round(b / 2^6)."""
    shifted = (b + 64 * 0x808080) % Q
    c = (shifted + 32) // 64
    assert c < 2**24
    return tuple((c >> (8 * i)) % 256 - 128 for i in range(3))


def value(three: Sequence[int]) -> int:
    """c = Σ 2^(8l)·D_l"""
    return sum(digit << (8 * i) for i, digit in enumerate(three))


def switch(low: int, middle: int, high: int) -> int:
    """u = round(b'·2^14 / q) mod 2^14 for b' = 2^6·Σ 2^(8l)·P_l mod q."""
    b = 64 * value((low, middle, high)) % Q
    return (2 * b * LEVELS + Q) // (2 * Q) % LEVELS


def packed(u: Sequence[int]) -> bytes:
    """One token's features as they travel: 64 times u >> 6, then four times six low bits in three bytes."""
    out = b""
    for start in range(0, len(u), 64):
        group = [*u[start : start + 64], *[0] * 64][:64]
        words = [sum((group[i + 16 * j] % 64) << (6 * j) for j in range(4)) for i in range(16)]
        out += bytes(one // 64 for one in group)
        out += bytes((word >> 8 * third) % 256 for third in range(3) for word in words)
    return out


def opened(u: int, a: int) -> int:
    """round(u·q / 2^14) − a modulo q, in −(q−1)/2..(q−1)/2."""
    residue = ((2 * u * Q + LEVELS) // (2 * LEVELS) - a) % Q
    return residue if residue <= Q // 2 else residue - Q
