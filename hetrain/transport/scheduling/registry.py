"""Who is there right now: the cards that workers keep in the broker, read about once a second."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from redis.exceptions import ResponseError

from hetrain.public.errors import WireError
from hetrain.public.protocol.messages import QUEUE
from hetrain.public.protocol.registration import (
    MAX_WORKERS,
    REGISTRATION_TTL_S,
    REGISTRY_KEY,
    WorkerRegistration,
    read_registration,
)
from hetrain.transport.requests.job_connection import JobConnection

_LONGEST_LIFE_S = 2 * REGISTRATION_TTL_S
_NAMES_IN_A_LINE = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Workers:
    """The workers at one moment.

    Attributes:
        registrations: one for each worker, sorted by name.
    """

    registrations: tuple[WorkerRegistration, ...] = ()
    _serving: dict[tuple[str, int, int], tuple[WorkerRegistration, ...]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def knows(self, model: str) -> bool:
        """Whether any worker serves at least a part of `model`."""
        return any(model in registration.models for registration in self.registrations)

    def serving(self, model: str, index: int, n_groups: int) -> tuple[WorkerRegistration, ...]:
        """The workers that can evaluate group `index` of `n_groups` of `model`."""
        key = (model, index, n_groups)
        if key not in self._serving:
            self._serving[key] = tuple(
                registration
                for registration in self.registrations
                if registration.serves(model, index, n_groups)
            )
        return self._serving[key]


class WorkerRegistry:
    """Keeps a `Workers` up to date. `refresh` is for one thread, `workers` for all."""

    def __init__(self, connection: JobConnection) -> None:
        self._connection = connection
        self._parsed: dict[bytes, WorkerRegistration | None] = {}
        self._has_warned = False
        self.workers = Workers()

    def refresh(self) -> frozenset[WorkerRegistration]:
        """Reads all cards; logs who has come and gone. Cards are hostile: what is none is ignored.

        Returns:
            The workers that have left since the last time.

        Raises:
            BrokerError: the broker fails. A broker that does not let this client read cards is one without.
        """
        found = self._read()
        self._parsed = {member: self._card(member) for member in found}
        # By score: of two cards of one worker the younger counts.
        latest = {
            registration.worker: registration
            for registration in self._parsed.values()
            if registration is not None
        }
        before, after = self.workers, Workers(tuple(latest[name] for name in sorted(latest)))
        if after == before:
            return frozenset()
        self.workers = after
        left = set(before.registrations) - set(after.registrations)
        _log_change("joined", set(after.registrations) - set(before.registrations), len(after.registrations))
        _log_change("left", left, len(after.registrations))
        # Of two workers of one name now one, now the other is seen: neither has left.
        return frozenset(registration for registration in left if registration.worker not in latest)

    def _read(self) -> list[bytes]:
        client = self._connection.client
        with self._connection.errors():
            try:
                seconds, microseconds = client.time()
                now = seconds + microseconds / 1e6
                # A card that would outlive its renewal by far is none of ours.
                found: list[bytes] = client.zrangebyscore(
                    REGISTRY_KEY, now, now + _LONGEST_LIFE_S, start=0, num=MAX_WORKERS
                )
            except ResponseError as error:  # no permission, or a key of another type
                if not self._has_warned:
                    self._has_warned = True
                    logger.warning(
                        "cannot see which workers there are (%s): all tasks go to queue %r", error, QUEUE
                    )
                return []
        self._has_warned = False
        return found

    def _card(self, member: bytes) -> WorkerRegistration | None:
        if member in self._parsed:
            return self._parsed[member]
        try:
            return read_registration(member)
        except WireError as error:
            logger.warning("ignored a worker's registration: %s", error)
            return None


def _log_change(what: str, registrations: Iterable[WorkerRegistration], count: int) -> None:
    names = sorted(
        f"{registration.worker} ({registration.queue}, {registration.device or 'device unknown'})"
        for registration in registrations
    )
    if names:
        more = f" and {len(names) - _NAMES_IN_A_LINE} more" if len(names) > _NAMES_IN_A_LINE else ""
        logger.info("workers %s: %s%s; %d there", what, ", ".join(names[:_NAMES_IN_A_LINE]), more, count)
