"""Names as users meet them: what a misspelt one was probably meant to be, and one for alike modules."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable


def did_you_mean(given: str, known: Iterable[str], *, likeness: float = 0.6) -> str:
    """A hint that names the known word most like `given`; empty if none is.

    Args:
        given: what a user wrote.
        known: the words that exist.
        likeness: least ratio of `difflib.SequenceMatcher` that counts.
    """
    close = difflib.get_close_matches(given, list(known), 1, likeness)
    return f"did you mean {close[0]}?" if close else ""


def starred(module: str) -> str:
    """A module's full name with ``*`` in place of its layer's number, which is a pattern for all layers."""
    return re.sub(r"[.][0-9]+[.]", ".*.", module)


def say_alike(modules: Iterable[str]) -> str:
    """Modules as users read them: each name that `starred` gives, and how many have it."""
    return ", ".join(f"{name} × {count}" for name, count in Counter(map(starred, modules)).items())
