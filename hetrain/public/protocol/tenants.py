"""Tenants: a prefix of all keys of a client, so that a broker can keep clients apart that share workers.

The broker's access list gives each client's user the keys ``hetrain:{tenant}*`` (docs/deployment.md). Tenants
have a fixed length, so none is a prefix of another.
"""

from __future__ import annotations

from hetrain.public.protocol.messages import new_token
from hetrain.public.settings import ClientSettings


def new_job() -> str:
    """A job's token: the tenant, if there is one, and 128 random bits that no other client can guess."""
    return ClientSettings().tenant + new_token()
