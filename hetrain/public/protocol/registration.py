"""Registrations of workers, by which clients route tasks and divide products.

Each worker keeps its registration in one sorted set of the broker. The score is the moment at which it
expires on the broker's clock, so that of a worker that has died just expires.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from hetrain.public.errors import UsageError, WireError
from hetrain.public.protocol.messages import QUEUE, VERSION, Line, Name, WorkerName, parse

REGISTRY_KEY = "hetrain:workers"
REGISTRATION_TTL_S = 6.0
HEARTBEAT_S = 1.5
MAX_WORKERS = 4096
LANES = 16
MAX_LANE_MODELS = 32
"""A worker of more models has no lanes: it would wait on too many queues."""
_MAX_SHARDS = 4096
_MAX_BYTES = 1 << 18
_SHARDS = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?/(\d{1,4})", re.ASCII)


@dataclass(frozen=True)
class ShardRange:
    """Shards ``first..last`` (inclusive) of ``count`` equal slices of a model's groups, in plan order.

    Raises:
        UsageError: not 0 ≤ first ≤ last < count ≤ 4096.
    """

    first: int
    last: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last < self.count <= _MAX_SHARDS:
            raise UsageError(
                f"shards {self} make no sense",
                hint=f"FIRST-LAST/COUNT with 0 <= FIRST <= LAST < COUNT <= {_MAX_SHARDS}, such as 0-7/32",
            )

    @staticmethod
    def parse(text: str) -> ShardRange:
        """``"0-7/32"``, or ``"3/4"`` for one shard. Raises `UsageError`."""
        match = _SHARDS.fullmatch(text.strip())
        if match is None:
            raise UsageError(
                f"{text[:100]!r} is no range of shards",
                hint="FIRST-LAST/COUNT, such as 0-7/32",
            )
        first, last, count = match.groups()
        return ShardRange(int(first), int(last or first), int(count))

    def __str__(self) -> str:
        return f"{self.first}-{self.last}/{self.count}"

    def has(self, index: int, n_groups: int) -> bool:
        """Whether group `index` of a plan of `n_groups` groups lies in these shards: ⌊index·count/n⌋."""
        return self.first <= index * self.count // n_groups <= self.last

    @property
    def queue(self) -> str:
        """The queue of workers that serve these shards alone, beside `QUEUE`."""
        return f"{QUEUE}.{self.first}-{self.last}of{self.count}"


def lane_of(job: str) -> int:
    """The lane of a job's tasks: its token's first digit, and so its tenant's, which an access list names."""
    return int(job[0], LANES)


def lane_queue(queue: str, model: str, lane: int) -> str:
    """A queue of its own for a model's tasks of one lane, beside `queue`.

    A worker gives lanes equal time (`tasks/intake/fair_order.py`), however many tasks wait in each; that jobs
    meet in a lane by chance is stochastic fairness queueing (McKenney, INFOCOM 1990). Eight digits of a
    BLAKE2b tell models and wire versions apart; a task in the wrong queue all the same is refused and sent
    again.
    """
    tag = hashlib.blake2b(f"{VERSION} {model}".encode(), digest_size=4, person=b"hetrain.lane").hexdigest()
    return f"{queue}.{tag}.{lane:x}"


def lane_queues(queue: str, models: Iterable[str]) -> tuple[str, ...]:
    """All queues beside `queue` from which a worker of `models` takes; none if these are too many."""
    models = sorted(set(models))
    if len(models) > MAX_LANE_MODELS:
        return ()
    return tuple(lane_queue(queue, model, lane) for model in models for lane in range(LANES))


def _valid_shards(text: str) -> str:
    try:
        return str(ShardRange.parse(text))
    except UsageError as error:
        raise ValueError(error.what) from error


class WorkerRegistration(BaseModel):
    """What a worker registers: constant while it runs, so that renewing it replaces it.

    Attributes:
        worker: its Celery name, unique among all workers.
        device: device and kernel, as in results.
        queue: where it takes tasks of any job.
        lanes: whether it takes from `lane_queues`, too.
        models: labels of what it serves.
        shards: the slices that it serves, as text; None for all.
        concurrency: tasks that it runs at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[2] = VERSION
    worker: WorkerName
    device: Line
    queue: Name
    lanes: bool = False
    models: Annotated[tuple[Line, ...], Field(max_length=1000, strict=False)]
    shards: Annotated[str, AfterValidator(_valid_shards)] | None = None
    concurrency: Annotated[int, Field(ge=1, le=1 << 16)]

    def serves(self, model: str, index: int, n_groups: int) -> bool:
        """Whether it can evaluate group `index` of `n_groups` of `model`."""
        whole = self.shards is None or ShardRange.parse(self.shards).has(index, n_groups)
        return whole and model in self.models

    def queue_of(self, model: str, job: str) -> str:
        """Where it takes the tasks of `job`, which trains `model`."""
        return lane_queue(self.queue, model, lane_of(job)) if self.lanes else self.queue

    @property
    def queues(self) -> tuple[str, ...]:
        """All queues from which it takes."""
        return (self.queue, *(lane_queues(self.queue, self.models) if self.lanes else ()))


def read_registration(data: bytes) -> WorkerRegistration:
    """Parses what lies in the registry. Raises `WireError` unless it registers a worker's queue."""
    where = "registry"
    if len(data) > _MAX_BYTES:
        raise WireError(f"a registration of {len(data)} bytes", where=where)
    registration = parse(WorkerRegistration, data, where=where)
    if registration.queue != QUEUE and not registration.queue.startswith(f"{QUEUE}."):
        raise WireError(f"a registration for queue {registration.queue!r}", where=where)
    return registration
