"""Rates of links, times and bytes: read as users write them, and written as they read them."""

from __future__ import annotations

import math
import re

from hetrain.public.errors import UsageError

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_BITS = re.compile(r"(\d+(?:\.\d+)?|\.\d+) ?([kmgt]?)(?:bits?(?:/s)?|bps)", re.IGNORECASE)


def parse_bits_per_second(text: str, *, field: str) -> float:
    """Bits per second, from ``1gbit``, ``2.5 Gbit/s``, ``100mbit`` or ``100mbps``; units are decimal.

    Args:
        text: what a user has written.
        field: the setting that is to blame if it is no rate.

    Raises:
        UsageError: it is none, or zero. Bytes per second are refused: ``MB`` is easily meant as ``Mbit``.
    """
    match = _BITS.fullmatch(text.strip())
    bits = float(match[1]) * _UNITS[match[2].lower()] if match else 0.0
    if not 0 < bits < math.inf:
        raise UsageError(
            f"{text!r} is no rate of a link", field=field, hint="write bits per second, as 100mbit or 2.5gbit"
        )
    return bits


def say_bits_per_second(bits: float) -> str:
    """``2.5 Gbit/s``."""
    if bits == math.inf:
        return "an endless rate"
    return f"{_scaled(bits)}bit/s"


def say_bytes(count: float) -> str:
    """``8.3 GB``, decimal."""
    return f"{_scaled(count)}B"


def say_seconds(seconds: float) -> str:
    """``12 s``, ``3.4 min``, ``5.1 h`` or ``12 days``."""
    if seconds == math.inf:
        return "forever"
    for limit, divisor, unit in ((90, 1, "s"), (5400, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.2g} {unit}"
    return f"{seconds / 86400:,.0f} days"


def _scaled(value: float) -> str:
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            digits = 0 if value >= 100 * factor else 1
            return f"{value / factor:,.{digits}f} {prefix}"
    return f"{value:.0f} "
