"""What an engine's parameters protect, and how far noise is from spoiling a result: figures for records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from hetrain.public.concrete.circuits import SECURITY_BITS
from hetrain.public.lattice.bounds import noise_bound
from hetrain.public.lattice.parameters import ETA, MODULUS_BITS, SECURITY_ESTIMATES, SLOTS
from hetrain.public.lattice.ring import MODULUS
from hetrain.public.model.quantization import Norms
from hetrain.public.protocol.plan import Plan
from hetrain.secret.engine import client_engine
from hetrain.secret.engines.concrete import MIN_ROWS


@dataclass(frozen=True)
class Protection:
    """How a job is protected.

    Attributes:
        hides: whether workers see ciphertexts only.
        parameters: the encryption's, in words; empty without any.
        security_bits: log2 of the operations of the best known attack, by cost model.
        headroom_bits: by group, for the products with W and with Wᵀ: log2 of half the modulus over the
            largest error that noise, rounding and an accepted result can add up to. Above 0, nothing wraps.
            Empty where results are exact.
        verify_rows: rows by which each result is verified.
    """

    hides: bool
    verify_rows: int
    parameters: str = ""
    security_bits: Mapping[str, float] = field(default_factory=dict)
    headroom_bits: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def protection_of(engine: str, plan: Plan, verify_rows: int) -> Protection:
    """The protection of a job with `plan`. Raises `UsageError` for an unknown engine."""
    hides = client_engine(engine).hides
    if engine == "rlwe":
        estimate = SECURITY_ESTIMATES[SLOTS, MODULUS_BITS, ETA]
        return Protection(
            hides,
            verify_rows,
            f"module LWE of dimension {SLOTS}, q = {MODULUS}, uniform ternary secret, "
            f"centred binomial noise with eta = {ETA}; a fresh secret for every ciphertext",
            {"Core-SVP": estimate.core_svp, "MATZOV": estimate.matzov},
            {
                group.name: (
                    _headroom(group.forward, group.out_features),
                    _headroom(group.backward, group.in_features),
                )
                for group in plan.groups
            },
        )
    if engine == "concrete":
        return Protection(
            hides,
            max(verify_rows, MIN_ROWS),
            "LWE with Concrete's parameters",
            {"Concrete's curve": float(SECURITY_BITS)},
        )
    return Protection(hides, verify_rows)


def _headroom(norms: Norms, rows: int) -> float:
    return math.log2(MODULUS / 2 / noise_bound(norms, rows))
