"""Where a job's requests go, and into how many pieces its products are cut, by what workers announce."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from hetrain.public.broker.connection import redacted
from hetrain.public.errors import NoWorker
from hetrain.public.protocol.messages import QUEUE, EvaluateTask
from hetrain.public.protocol.plan import Plan
from hetrain.public.protocol.registration import ShardRange, WorkerRegistration
from hetrain.transport.requests.state import Request
from hetrain.transport.scheduling.partition import count_pieces
from hetrain.transport.scheduling.registry import WorkerRegistry
from hetrain.transport.scheduling.throughput import Throughput

_LOAD_WEIGHT = 0.125
_NAMES_IN_A_MESSAGE = 5
_NO_GROUPS: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class Coverage:
    """How the fleet covers a plan.

    Attributes:
        queues: those that the job's requests may take.
        missing: groups that nobody serves while others are served, as indices in plan order.
    """

    queues: tuple[str, ...]
    missing: tuple[int, ...]


class Router:
    """Finds the way for a job's requests. Thread-safe, once it follows a plan.

    Args:
        registry: knows the workers.
        url: the broker's address, for messages.
    """

    def __init__(self, registry: WorkerRegistry, url: str) -> None:
        self.registry = registry
        self.throughput = Throughput()
        self._url = url
        self._model = ""
        self._groups = _NO_GROUPS
        self._load: float | None = None
        self._lock = threading.Lock()

    def follow(self, plan: Plan) -> None:
        """Routes requests for the groups of `plan` from now on."""
        self._model = plan.model
        self._groups = {group.name: index for index, group in enumerate(plan.groups)}

    def coverage(self) -> Coverage:
        """Which queues serve the plan. `QUEUE` alone where no card names the model."""
        if not self.registry.workers.knows(self._model):
            return Coverage((QUEUE,), ())
        queues: set[str] = set()
        missing = []
        for group, index in self._groups.items():
            serving = self._serving(group)
            queues.update(registration.queue for registration in serving)
            if not serving:
                missing.append(index)
        return Coverage(tuple(sorted(queues)), tuple(missing))

    def assign(self, request: Request, among: Iterable[Request]) -> None:
        """Chooses the queue of `request`: of those that serve it the one with the fewest requests per slot.

        Where nobody serves it, it stays on the queue it was sent to; a first time it goes to `QUEUE`.

        Args:
            request: about to be sent. A `PrepareTask` stays on its queue.
            among: all of the job's requests.
        """
        slots: Counter[str] = Counter()
        for registration in self._serving_request(request):
            slots[registration.queue] += registration.concurrency
        if not slots:
            return
        load = Counter(other.queue for other in among if other is not request and not other.is_settled)
        request.queue = min(
            slots, key=lambda queue: (queue in request.refused_on, (load[queue] + 1) / slots[queue], queue)
        )

    def is_misrouted(self, request: Request) -> bool:
        """Whether nobody takes `request` from its queue, while another queue's workers would."""
        serving = self._serving_request(request)
        return bool(serving) and request.queue not in {registration.queue for registration in serving}

    def serves_elsewhere(self, request: Request, worker: str) -> bool:
        """Whether `worker`, which has refused `request`, does not announce to serve it while others do."""
        serving = self._takers(request)
        return bool(serving) and worker not in {registration.worker for registration in serving}

    def is_served(self, request: Request) -> bool:
        """Whether a worker announces that it takes from the queue of `request` and serves it."""
        return any(registration.queue == request.queue for registration in self._takers(request))

    def _takers(self, request: Request) -> tuple[WorkerRegistration, ...]:
        """Workers that serve `request`: of its group, or, to prepare the job, of its queue and model."""
        if isinstance(request.task, EvaluateTask):
            return tuple(self._serving_request(request))
        return tuple(
            registration
            for registration in self.registry.workers.registrations
            if registration.queue == request.queue and self._model in registration.models
        )

    def is_unserved(self, request: Request) -> bool:
        """Whether nobody serves the group of `request`, while other groups of its model are served."""
        task = request.task
        return (
            isinstance(task, EvaluateTask)
            and task.group in self._groups
            and self.registry.workers.knows(self._model)
            and not self._serving(task.group)
        )

    def pieces(self, group: str, work: float, in_flight: int) -> int:
        """How many pieces to cut a product with `group` into.

        Args:
            group: the group's name.
            work: see `hetrain.transport.scheduling.throughput.work_of`.
            in_flight: products that wait for workers now, this one included.
        """
        with self._lock:
            load = in_flight if self._load is None else self._load
            self._load = load + _LOAD_WEIGHT * (in_flight - load)
            load = max(self._load, 1.0)
        paces = [
            (registration.concurrency, self.throughput.of(registration.worker))
            for registration in self._serving(group)
        ]
        return count_pieces(paces, load, work)

    def no_worker(self, queue: str, waited_s: float) -> NoWorker:
        """The error that nobody has taken a request from `queue`."""
        models = sorted(
            {model for registration in self.registry.workers.registrations for model in registration.models}
        )
        only = f"; the workers that are there serve only: {_listed(models)}" if models else ""
        only = "" if self._model in models else only
        shards = "" if queue == QUEUE else f" HETRAIN_SHARDS={queue.partition('.')[2].replace('of', '/')}"
        return NoWorker(
            f"no worker answered on queue {queue!r} within {waited_s:.0f} s{only}",
            where=redacted(self._url),
            hint=f"start one with HETRAIN_BROKER_URL=...{shards} celery -A tasks worker -Q {queue}",
        )

    def not_served(self, missing: Sequence[int], waited_s: float) -> NoWorker:
        """The error that nobody serves the groups `missing` of the plan, while others are served."""
        names = [name for name, index in self._groups.items() if index in set(missing)]
        shards = self._shards_of(missing)
        told = f" (shards {', '.join(shards)})" if shards else ""
        return NoWorker(
            f"for {waited_s:.0f} s no worker has served {len(names)} of the {len(self._groups)} groups of "
            f"{self._model}: {_listed(names)}{told}",
            where=redacted(self._url),
            hint=f"start workers with HETRAIN_SHARDS={shards[0] if shards else 'FIRST-LAST/COUNT'}, "
            "or workers that serve the whole model",
        )

    def _shards_of(self, indices: Sequence[int]) -> list[str]:
        """`indices` as ranges of shards, in the count that most workers of the model announce."""
        counts = Counter(
            ShardRange.parse(registration.shards).count
            for registration in self.registry.workers.registrations
            if registration.shards is not None and self._model in registration.models
        )
        if not counts:
            return []
        count, _ = counts.most_common(1)[0]
        runs: list[list[int]] = []
        for shard in sorted({index * count // len(self._groups) for index in indices}):
            if runs and shard == runs[-1][1] + 1:
                runs[-1][1] = shard
            else:
                runs.append([shard, shard])
        return [str(ShardRange(first, last, count)) for first, last in runs]

    def _serving_request(self, request: Request) -> tuple[WorkerRegistration, ...]:
        return self._serving(request.task.group) if isinstance(request.task, EvaluateTask) else ()

    def _serving(self, group: str) -> tuple[WorkerRegistration, ...]:
        index = self._groups.get(group)
        if index is None:
            return ()
        return self.registry.workers.serving(self._model, index, len(self._groups))


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_IN_A_MESSAGE
    return ", ".join(names[:_NAMES_IN_A_MESSAGE]) + (f" and {more} more" if more > 0 else "")
