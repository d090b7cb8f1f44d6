"""Arguments that several functions share."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

from hetrain.config import ComparisonConfig

DatasetNames = str | PathLike[str] | Sequence[str | PathLike[str]]

NO_COMPARISON = ComparisonConfig()


def broker_url(workers: str | None) -> str | None:
    """The broker's address, completed by a password from a file."""
    from hetrain.public.settings import broker_address

    return None if workers is None else broker_address(workers)
