"""Who is there right now: the cards that workers keep in the broker, read about once a second."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from redis.exceptions import ResponseError

from hetrain.public.errors import WireError
from hetrain.public.protocol.messages import QUEUE, parse
from hetrain.public.protocol.registration import CARD_TTL_S, FLEET_KEY, MAX_CARDS, WorkerCard
from hetrain.transport.requests.job_connection import Link

_LONGEST_LIFE_S = 2 * CARD_TTL_S
_LARGEST_CARD_BYTES = 1 << 18
_NAMES_IN_A_LINE = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fleet:
    """The workers at one moment.

    Attributes:
        cards: one for each worker, sorted by name.
    """

    cards: tuple[WorkerCard, ...] = ()
    _serving: dict[tuple[str, int, int], tuple[WorkerCard, ...]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def knows(self, model: str) -> bool:
        """Whether any worker serves at least a part of `model`."""
        return any(model in card.models for card in self.cards)

    def serving(self, model: str, index: int, n_groups: int) -> tuple[WorkerCard, ...]:
        """The workers that can evaluate group `index` of `n_groups` of `model`."""
        key = (model, index, n_groups)
        if key not in self._serving:
            self._serving[key] = tuple(card for card in self.cards if card.serves(model, index, n_groups))
        return self._serving[key]


class FleetWatch:
    """Keeps a `Fleet` up to date. `refresh` is for one thread, `fleet` for all."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._parsed: dict[bytes, WorkerCard | None] = {}
        self._has_warned = False
        self.fleet = Fleet()

    def refresh(self) -> frozenset[str]:
        """Reads all cards; logs who has come and gone. Cards are hostile: what is none is ignored.

        Returns:
            The queues that have lost a worker since the last time.

        Raises:
            BrokerError: the broker fails. A broker that does not let this client read cards is one without.
        """
        found = self._read()
        self._parsed = {member: self._card(member) for member in found}
        # By score: of two cards of one worker the younger counts.
        latest = {card.worker: card for card in self._parsed.values() if card is not None}
        before, after = self.fleet, Fleet(tuple(latest[name] for name in sorted(latest)))
        if after == before:
            return frozenset()
        self.fleet = after
        left = set(before.cards) - set(after.cards)
        _log_change("joined", set(after.cards) - set(before.cards), len(after.cards))
        _log_change("left", left, len(after.cards))
        # Of two workers of one name now one, now the other is seen: neither has left.
        return frozenset(card.queue for card in left if card.worker not in latest)

    def _read(self) -> list[bytes]:
        client = self._link.client
        with self._link.errors():
            try:
                seconds, microseconds = client.time()
                now = seconds + microseconds / 1e6
                # A card that would outlive its renewal by far is none of ours.
                found: list[bytes] = client.zrangebyscore(
                    FLEET_KEY, now, now + _LONGEST_LIFE_S, start=0, num=MAX_CARDS
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

    def _card(self, member: bytes) -> WorkerCard | None:
        if member in self._parsed:
            return self._parsed[member]
        try:
            if len(member) > _LARGEST_CARD_BYTES:
                raise WireError(f"a card of {len(member)} bytes", where="fleet")
            card = parse(WorkerCard, member, where="fleet")
            if card.queue != QUEUE and not card.queue.startswith(f"{QUEUE}."):
                raise WireError(f"a card for queue {card.queue!r}", where="fleet")
        except WireError as error:
            logger.warning("ignored a worker's card: %s", error)
            return None
        return card


def _log_change(what: str, cards: Iterable[WorkerCard], count: int) -> None:
    names = sorted(f"{card.worker} ({card.queue}, {card.device or 'device unknown'})" for card in cards)
    if names:
        more = f" and {len(names) - _NAMES_IN_A_LINE} more" if len(names) > _NAMES_IN_A_LINE else ""
        logger.info("workers %s: %s%s; %d there", what, ", ".join(names[:_NAMES_IN_A_LINE]), more, count)
