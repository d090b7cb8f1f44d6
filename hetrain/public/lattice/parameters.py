"""Encryption parameter sets, and the table of security estimates that admits them.

The scheme is (module) learning with errors over R_q = Z_q[X]/(X^N + 1), q = 2^32, with a uniform ternary
secret of rank d and centred binomial noise. A set whose dimension n = N·d, modulus and noise have no row of
at least `MIN_SECURITY_BITS` in `SECURITY_ESTIMATES` cannot be built, unless its name starts with
``insecure``.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from hetrain.public.errors import ParameterError

MIN_SECURITY_BITS = 128
MODULUS_BITS = 32
SLOTS = 2048
"""Tokens that the largest ring holds: one token per coefficient."""


@dataclass(frozen=True)
class Estimate:
    """log2 of classical operations of the best known attack, for two lattice reduction cost models."""

    matzov: float
    core_svp: float


# Estimator: malb/lattice-estimator, commit 27a581bb; uniform ternary secret, unlimited samples; minimum over
# primal uSVP, primal BDD and dual hybrid. Module LWE is estimated as unstructured LWE of dimension n.
# Keys: (dimension n = N·d, log2 q, eta of the centred binomial noise).
SECURITY_ESTIMATES = MappingProxyType(
    {
        (2048, 32, 21): Estimate(matzov=219.1, core_svp=195.1),
        (2048, 32, 16): Estimate(matzov=217.9, core_svp=193.4),
    }
)


@dataclass(frozen=True)
class ParameterSet:
    """One choice of ring degree, module rank and noise.

    Attributes:
        name: how messages refer to it.
        ring_degree: N, a power of two; a ciphertext polynomial holds one value for each of N tokens.
        rank: d; a mask is d polynomials, and security is that of dimension N·d.
        eta: noise is a sum of eta bits minus a sum of eta bits: |e| ≤ eta, standard deviation √(eta/2).

    Raises:
        ParameterError: the numbers are inconsistent, or the set is not known to be secure and its name
            does not start with ``insecure``.
    """

    name: str
    ring_degree: int
    rank: int
    eta: int = 21

    def __post_init__(self) -> None:
        n = self.ring_degree
        if n < 4 or n & (n - 1):
            raise ParameterError(f"ring degree {n} is not a power of two of at least 4", where=self.name)
        if self.rank < 1 or not 1 <= self.eta <= 21:
            raise ParameterError(f"rank {self.rank} or eta {self.eta} is out of range", where=self.name)
        if self.name.startswith("insecure"):
            return
        estimate = SECURITY_ESTIMATES.get((self.dimension, MODULUS_BITS, self.eta))
        if estimate is None or min(estimate.matzov, estimate.core_svp) < MIN_SECURITY_BITS:
            raise ParameterError(
                f"no estimate of at least {MIN_SECURITY_BITS} bits for dimension {self.dimension}, "
                f"modulus 2^{MODULUS_BITS}, eta {self.eta}",
                where=self.name,
                hint="use a set from PARAMETER_SETS; a set for experiments must be named insecure-...",
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
