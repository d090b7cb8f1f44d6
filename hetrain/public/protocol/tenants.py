"""Tenants: a prefix of all of a client's keys, so that a broker can keep clients apart that share a fleet.

The broker's access list gives each client's user the keys ``hetrain:{tenant}*`` (docs/deployment.md). Tenants
have a fixed length, so none is a prefix of another.
"""

from __future__ import annotations

import os
import re

from hetrain.public.errors import UsageError
from hetrain.public.protocol.messages import new_token

VARIABLE = "HETRAIN_TENANT"
_TENANT = re.compile(r"[0-9a-f]{16}", re.ASCII)


def tenant() -> str:
    """The 16 hexadecimal digits of HETRAIN_TENANT, or nothing where it is not set. Raises `UsageError`."""
    text = os.environ.get(VARIABLE, "")
    if text and _TENANT.fullmatch(text) is None:
        raise UsageError(
            f"{text[:40]!r} is no tenant",
            where=VARIABLE,
            hint="16 lower-case hexadecimal digits, as the broker's access list has them for this user",
        )
    return text


def new_job() -> str:
    """A job's token: the tenant, if there is one, and 128 random bits that nobody else can guess."""
    return tenant() + new_token()
