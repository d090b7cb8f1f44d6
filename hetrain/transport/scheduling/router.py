"""Where a job's requests go, and into how many pieces its products are cut, by the registered workers."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from hetrain.public.broker.connection import redacted
from hetrain.public.errors import NoWorker
from hetrain.public.protocol.messages import QUEUE, EvaluateTask, PrepareTask
from hetrain.public.protocol.plan import Plan
from hetrain.public.protocol.registration import ShardRange, WorkerRegistration
from hetrain.transport.requests.request import Request
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
        missing: groups that no worker serves while others are served, as indices in plan order.
    """

    queues: tuple[str, ...]
    missing: tuple[int, ...]


class Router:
    """Chooses the queues of a job's requests. Thread-safe, once it follows a plan.

    Args:
        registry: knows the workers.
        job: the job's token, which names its lane.
        url: the broker's address, for messages.
    """

    def __init__(self, registry: WorkerRegistry, job: str, url: str) -> None:
        self.registry = registry
        self.throughput = Throughput()
        self._job = job
        self._url = url
        self._model = ""
        self._groups = _NO_GROUPS
        self._excluded: frozenset[str] = frozenset()
        self._in_flight: float | None = None
        self._load: Counter[str] = Counter()
        self._lock = threading.Lock()

    def follow(self, plan: Plan) -> None:
        """Routes requests for the groups of `plan` from now on."""
        self._model = plan.model
        self._groups = {group.name: index for index, group in enumerate(plan.groups)}

    def queue_of(self, registration: WorkerRegistration) -> str:
        """Where a worker takes this job's tasks."""
        return registration.queue_of(self._model, self._job)

    def coverage(self) -> Coverage:
        """Which queues serve the plan. `QUEUE` alone where no registration names the model."""
        if not self.registry.workers.knows(self._model):
            return Coverage((QUEUE,), ())
        queues: set[str] = set()
        missing = []
        for group, index in self._groups.items():
            serving = self._serving(group)
            queues.update(self.queue_of(registration) for registration in serving)
            if not serving:
                missing.append(index)
        return Coverage(tuple(sorted(queues)), tuple(missing))

    def assign(self, request: Request, queue: str) -> str:
        """The queue of a request that is about to be sent for the first time, which is counted there.

        Args:
            request: what is sent.
            queue: where it goes if no registered worker serves its group, or if it is a `PrepareTask`.
        """
        with self._lock:
            chosen = self._choose(request, queue, Counter(self._load))
            self._load[chosen] += 1
        return chosen

    def choose(self, request: Request, queue: str, refused_on: Collection[str]) -> str:
        """The queue of a request that is sent again: of those that serve it the one with the fewest per slot.

        Args:
            request: what is sent.
            queue: where it was sent before, and stays if no registered worker serves its group.
            refused_on: queues that are taken only if there is no other.
        """
        with self._lock:
            others = Counter(self._load)
            others[queue] -= 1
            return self._choose(request, queue, others, refused_on)

    def count(self, queue: str, change: int) -> None:
        """Counts `change` more requests on `queue`."""
        with self._lock:
            self._load[queue] += change

    def exclude(self, worker: str) -> None:
        """Sends nothing to a queue for the sake of `worker` any more."""
        self._excluded |= {worker}

    def _choose(
        self, request: Request, queue: str, load: Counter[str], refused_on: Collection[str] = ()
    ) -> str:
        slots: Counter[str] = Counter()
        for registration in self._serving_task(request.task):
            if registration.worker not in self._excluded:
                slots[self.queue_of(registration)] += registration.concurrency
        return min(
            slots,
            key=lambda name: (name in refused_on, (load[name] + 1) / slots[name], name),
            default=queue,
        )

    def serving(self, request: Request, queue: str) -> dict[str, str]:
        """The workers that are registered to serve `request`, and the queues from which they take.

        To prepare the job, these are the workers of `queue` that serve a part of its model.
        """
        found = self._serving_task(request.task)
        if isinstance(request.task, PrepareTask):
            registered = self.registry.workers.registrations
            found = tuple(
                each for each in registered if self.queue_of(each) == queue and self._model in each.models
            )
        return {registration.worker: self.queue_of(registration) for registration in found}

    def serves_group(self, request: Request) -> bool:
        """Whether a registered worker serves the group of `request`, or none any group of its model."""
        task = request.task
        return (
            isinstance(task, PrepareTask)
            or task.group not in self._groups
            or not self.registry.workers.knows(self._model)
            or bool(self._serving(task.group))
        )

    def pieces(self, group: str, work: float, in_flight: int) -> int:
        """How many pieces to cut a product with `group` into.

        Args:
            group: the group's name.
            work: see `hetrain.transport.scheduling.throughput.work_of`.
            in_flight: products that wait for workers now, this one included.
        """
        with self._lock:
            mean = in_flight if self._in_flight is None else self._in_flight
            self._in_flight = mean + _LOAD_WEIGHT * (in_flight - mean)
            load = max(self._in_flight, 1.0)
        paces = [
            (registration.concurrency, self.throughput.of(registration.worker))
            for registration in self._serving(group)
            if registration.worker not in self._excluded
        ]
        return count_pieces(paces, load, work)

    def no_worker(self, queue: str, waited_s: float) -> NoWorker:
        """The error that no worker has taken a request from `queue`."""
        models = sorted(
            {model for registration in self.registry.workers.registrations for model in registration.models}
        )
        only = f"; the workers that are there serve only: {_listed(models)}" if models else ""
        only = "" if self._model in models else only
        parts = _shards_in(queue)
        shards = "".join(f" HETRAIN_SHARDS={part.replace('of', '/')}" for part in parts)
        without_lane = ".".join((QUEUE, *parts))
        return NoWorker(
            f"no worker answered on queue {without_lane!r} within {waited_s:.0f} s{only}",
            where=redacted(self._url),
            hint=f"start one with HETRAIN_BROKER_URL=...{shards} celery -A tasks worker -Q {QUEUE}",
        )

    def not_served(self, missing: Sequence[int], waited_s: float) -> NoWorker:
        """The error that no worker serves the groups `missing` of the plan, while others are served."""
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

    def _serving_task(self, task: PrepareTask | EvaluateTask) -> tuple[WorkerRegistration, ...]:
        return self._serving(task.group) if isinstance(task, EvaluateTask) else ()

    def _serving(self, group: str) -> tuple[WorkerRegistration, ...]:
        index = self._groups.get(group)
        if index is None:
            return ()
        return self.registry.workers.serving(self._model, index, len(self._groups))


def _shards_in(queue: str) -> list[str]:
    """The part of a queue's name that tells shards; neither a model's tag nor a lane has this form."""
    return [part for part in queue.split(".")[1:2] if "of" in part]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_IN_A_MESSAGE
    return ", ".join(names[:_NAMES_IN_A_MESSAGE]) + (f" and {more} more" if more > 0 else "")
