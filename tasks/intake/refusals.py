"""How many messages this process has refused, and a log of them that no sender can flood."""

from __future__ import annotations

import logging
from time import monotonic

from tasks.intake.envelope import Refused

_LOG_INTERVAL_S = 10.0

logger = logging.getLogger(__name__)


class Refusals:
    """Counts refused messages. Used by the thread that takes messages; others may read `count`.

    Attributes:
        count: how many there were.
    """

    def __init__(self) -> None:
        self.count = 0
        self._logged = 0
        self._silent_until = 0.0

    def note(self, source: str, refused: Refused) -> None:
        """Counts one, and logs it unless something was logged in the last 10 s.

        Args:
            source: where it was taken from.
            refused: why it was refused.
        """
        self.count += 1
        if monotonic() < self._silent_until:
            return
        self._silent_until = monotonic() + _LOG_INTERVAL_S
        more = self.count - self._logged - 1
        also = f"; {more} more were dropped since the last such line" if more else ""
        logger.warning("dropped a message from %s, which is not ours: %s%s", source, refused.reason, also)
        self._logged = self.count


refusals = Refusals()
"""Of this process."""
