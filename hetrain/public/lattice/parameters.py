"""Encryption parameter sets, and the table of security estimates that admits them.

The scheme is (module) learning with errors over R_q = Z_q[X]/(X^N + 1), q = 2^30 − 49151, with a uniform
ternary secret of rank d, N·d = 2048, and centred binomial noise. A set whose dimension, modulus and noise
have no row of at least `MIN_SECURITY_BITS` in `SECURITY_ESTIMATES` cannot be built.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from hetrain.public.errors import ParameterError

MIN_SECURITY_BITS = 128
MODULUS_BITS = 30
ETA = 8
"""Noise is a sum of eta bits minus a sum of eta bits: |e| ≤ 8, standard deviation 2."""
SLOTS = 2048
"""Tokens that the largest ring holds: one token per coefficient. Also N·d of every parameter set."""


@dataclass(frozen=True)
class Estimate:
    """log2 of classical operations of the best known attack, for two lattice reduction cost models."""

    matzov: float
    core_svp: float


# Estimator: malb/lattice-estimator, commit 27a581bb; uniform ternary secret, unlimited samples; minimum over
# primal uSVP and the dual hybrid attack. Module LWE is estimated as unstructured LWE of dimension n.
# Keys: (dimension n = N·d, log2 q, eta of the centred binomial noise).
SECURITY_ESTIMATES = MappingProxyType(
    {
        (2048, 30, 21): Estimate(matzov=234.5, core_svp=211.1),
        (2048, 30, 8): Estimate(matzov=229.2, core_svp=205.2),
        (2048, 30, 4): Estimate(matzov=225.0, core_svp=201.3),
        (1536, 30, 8): Estimate(matzov=168.6, core_svp=142.5),
    }
)


@dataclass(frozen=True)
class ParameterSet:
    """One choice of ring degree and module rank.

    Attributes:
        name: how messages refer to it.
        ring_degree: N, a power of two; a ciphertext polynomial holds one value for each of N tokens.
        rank: d; a mask is d polynomials, and security is that of dimension N·d.

    Raises:
        ParameterError: the numbers are inconsistent, or the set is not known to be secure.
    """

    name: str
    ring_degree: int
    rank: int

    def __post_init__(self) -> None:
        n = self.ring_degree
        if n < 16 or n & (n - 1) or n * self.rank != SLOTS:
            raise ParameterError(
                f"ring degree {n} is no power of two from 16 on, or times rank {self.rank} not {SLOTS}",
                where=self.name,
            )
        estimate = SECURITY_ESTIMATES.get((self.dimension, MODULUS_BITS, ETA))
        if estimate is None or min(estimate.matzov, estimate.core_svp) < MIN_SECURITY_BITS:
            raise ParameterError(
                f"no estimate of at least {MIN_SECURITY_BITS} bits for dimension {self.dimension}, "
                f"modulus 2^{MODULUS_BITS}, eta {ETA}",
                where=self.name,
                hint="use a set from PARAMETER_SETS",
            )

    @property
    def dimension(self) -> int:
        """n = N·d, the LWE dimension that carries the security."""
        return self.ring_degree * self.rank


PARAMETER_SETS = MappingProxyType(
    {
        p.name: p
        for p in (
            ParameterSet("rlwe-256x8", ring_degree=256, rank=8),
            ParameterSet("rlwe-512x4", ring_degree=512, rank=4),
            ParameterSet("rlwe-1024x2", ring_degree=1024, rank=2),
            ParameterSet("rlwe-2048x1", ring_degree=2048, rank=1),
        )
    }
)


def require_tokens(tokens: int) -> None:
    """Raises `ParameterError` unless `tokens` is in 1..2048."""
    if not 1 <= tokens <= SLOTS:
        raise ParameterError(
            f"{tokens} tokens do not fit one ciphertext of 1 to {SLOTS}", hint="split them into blocks"
        )


def parameters_for(tokens: int) -> ParameterSet:
    """The set with the smallest ring degree N ≥ `tokens`.

    Raises:
        ParameterError: `tokens` is not in 1..2048.
    """
    require_tokens(tokens)
    return next(p for p in PARAMETER_SETS.values() if p.ring_degree >= tokens)
