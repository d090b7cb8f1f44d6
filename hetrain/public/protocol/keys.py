"""Names and lifetimes of the Redis keys that client and workers share. Every one of them expires."""

from __future__ import annotations

import hashlib

from hetrain.public.protocol.messages import Blob

BLOB_TTL_S = 900
DONE_TTL_S = 900
FINISHED_TTL_S = 900
TRIES_TTL_S = 900
ALIVE_TTL_S = 60
# As long as a task's message: a broker without memory for that one refuses this value too.
ALIVE_VALUE = "." * 4096
LEASE_TTL_MS = 4000
LEASE_RENEWAL_S = 1.0
MAX_TRIES = 5
# For as long a client waits for a task that a living worker runs.
RUN_LIMIT_S = 600.0
PREPARE_LIMIT_S = 1800.0


def done_list(job: str) -> str:
    """List of `Completion` messages: workers push, the client pops."""
    return f"hetrain:{job}:done"


def alive(job: str) -> str:
    """Exists while the client lives and the broker remembers. Without it workers do nothing for the job."""
    return f"hetrain:{job}:alive"


def finished(job: str, request: str) -> str:
    """The `Completion` of a finished request, for whoever gets the same task again."""
    return f"hetrain:{job}:fin:{request}"


def tries(job: str, request: str) -> str:
    """How often a worker has begun the request."""
    return f"hetrain:{job}:tries:{request}"


def lease(job: str, request: str) -> str:
    """Exists while a worker is running the request; a dead worker's lease runs out."""
    return f"hetrain:{job}:lease:{request}"


def chunk(blob: Blob, index: int) -> str:
    """Chunk `index` of a blob."""
    return f"{blob.key}:{index}"


def output_token(request: str, worker: str) -> str:
    """The token of a request's result: a second run overwrites the first one's, but not another worker's."""
    return hashlib.sha256(f"hetrain output {request} {worker}".encode()).hexdigest()[:32]
