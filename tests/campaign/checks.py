"""What must hold after every round."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from time import monotonic, sleep

import psutil
import redis
from safetensors import SafetensorError
from safetensors.torch import load_file

from hetrain.public.protocol.messages import QUEUE
from hetrain.public.protocol.registration import REGISTRY_KEY
from tests.campaign.client import MICRO_BATCHES, Client
from tests.campaign.installation import WORKERS, Installation
from tests.campaign.plan import UPDATES

KEYS_GONE_S = 20.0
"""Seconds after a job's end within which nothing of it is left; a lease lasts 4 s."""
SERVE_AGAIN_S = 60.0
"""Seconds within which all workers are registered again."""
_POLL_S = 0.05
_MOST_COUNTED_S = 0.1
ADAPTER = "adapter_model.safetensors"
"""The file in a job's output directory."""


def check_result(client: Client, reference: Path | None) -> Iterator[str]:
    """Yields what is wrong with what a job has written.

    Args:
        client: of the job, which has ended.
        reference: the adapter that it must have, to the bit; None where it need only be finite.
    """
    if client.statuses[-1] != 0:
        yield f"the client ended with {client.statuses[-1]}"
        return
    steps = Counter(record["step"] for record in client.records())
    if steps != Counter(dict.fromkeys(range(1, UPDATES + 1), MICRO_BATCHES)):
        yield f"the updates' micro-batches are {dict(steps)}"
    if (status := json.loads((client.output / "job.json").read_text())["status"]) != "done":
        yield f"job.json says {status!r}"
    if hidden := sorted(path.name for path in client.output.glob(".*")):
        yield f"hidden files are left: {hidden}"
    if "Traceback" in client.errors():
        yield "the client wrote a traceback"
    yield from _check_adapter(client.output / ADAPTER, reference)


def _check_adapter(path: Path, reference: Path | None) -> Iterator[str]:
    try:
        values = load_file(path)
    except (OSError, SafetensorError) as error:
        yield f"the adapter cannot be read: {error}"
        return
    if reference is not None and path.read_bytes() != reference.read_bytes():
        yield "the adapter differs from that of the undisturbed run"
    if not all(math.isfinite(float(value.abs().sum())) for value in values.values()):
        yield "the adapter is not finite"


def check_keys(admin: redis.Redis, jobs_killed: set[str]) -> Iterator[str]:
    """Yields what a round's jobs have left in the broker and must not have, and removes everything.

    A job whose client was killed leaves keys, which all expire.
    """

    def left() -> list[str]:
        names = (name.decode() for name in admin.keys("hetrain:*"))
        return sorted(n for n in names if n != REGISTRY_KEY and n.split(":")[1] not in jobs_killed)

    def waiting() -> int:
        return sum(admin.llen(name) for name in (QUEUE, *admin.keys(f"{QUEUE}.*")))

    if not _within(KEYS_GONE_S, lambda: not left() and not waiting()):
        for name in left():
            _, job, rest = name.split(":", 2)
            yield f"left in the broker by job {job}, {admin.ttl(name)} s to live: {rest}"
        if count := waiting():
            yield f"{count} messages are left on the queues"
    for name in admin.keys("hetrain:*:*"):
        if admin.ttl(name) == -1:
            yield f"left by a killed client, for ever: {name.decode().split(':', 2)[2]}"
        admin.delete(name)


class Processes:
    """The processes of an installation, all of which this process knows."""

    def __init__(self, installation: Installation) -> None:
        """Call it when everything that stays runs, and no client."""
        self._installation = installation
        self._staying = self._descendants() - self._changing()

    def check(self) -> Iterator[str]:
        """Yields processes that a round has left, and workers that are missing."""
        if not _within(SERVE_AGAIN_S, lambda: self._descendants() == self._staying | self._changing()):
            for pid in self._descendants() - self._staying - self._changing():
                yield f"left running: {' '.join(psutil.Process(pid).cmdline())[:200]}"
            if missing := (self._staying | self._changing()) - self._descendants():
                yield f"processes have ended: {len(missing)}"

    def _changing(self) -> set[int]:
        return {self._installation.broker.pid, *self._installation.workers.running()}

    @staticmethod
    def _descendants() -> set[int]:
        found = set()
        for each in psutil.Process().children(recursive=True):
            try:
                if each.status() != psutil.STATUS_ZOMBIE:
                    found.add(each.pid)
            except psutil.NoSuchProcess:
                continue
        return found


def check_workers(installation: Installation) -> Iterator[str]:
    """Yields a word when workers are not all there again. Returns as soon as they are."""
    ready: Mapping[int, bool] = {}

    def all_serve() -> bool:
        nonlocal ready
        ready = installation.workers.running()
        now = installation.broker.admin.time()[0]
        registered = installation.broker.admin.zcount(REGISTRY_KEY, now, "+inf")
        return sum(ready.values()) == WORKERS and registered >= WORKERS

    if not _within(SERVE_AGAIN_S, all_serve):
        yield f"after {SERVE_AGAIN_S:g} s not all workers serve again; {sum(ready.values())} are ready"


class Patience:
    """Time in which this process has run, and so could the others: an overloaded machine is excused."""

    def __init__(self, seconds: float) -> None:
        self._left_s, self._seen_at = seconds, monotonic()

    def is_over(self) -> bool:
        """Whether `seconds` have passed. Of the time between two calls, at most 0.1 s counts."""
        now = monotonic()
        self._left_s -= min(now - self._seen_at, _MOST_COUNTED_S)
        self._seen_at = now
        return self._left_s < 0


def _within(seconds: float, condition: Callable[[], object]) -> bool:
    patience = Patience(seconds)
    while not condition():
        if patience.is_over():
            return False
        sleep(_POLL_S)
    return True
