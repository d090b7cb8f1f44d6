"""Counts what goes wrong with single workers: one by which nothing ends well is named and passed over."""

from __future__ import annotations

from dataclasses import dataclass, field

MOST_STRIKES = 3
_SPACING_S = 2.0


@dataclass
class Strikes:
    """Losses and failures by worker since its last good result.

    A broker that restarts loses the results of honest workers too, but all at once: losses of one worker
    count once in two seconds, and not at all if the broker turns out to have restarted.
    """

    _times: dict[str, list[float]] = field(default_factory=dict)

    def add(self, worker: str, now: float, *, at_once: bool) -> bool:
        """Counts one at `now`. Returns whether there are too many.

        Args:
            worker: by whom.
            now: on the monotonic clock.
            at_once: whether it counts, however soon it follows another one.
        """
        times = self._times.setdefault(worker, [])
        if at_once or not times or now - times[-1] >= _SPACING_S:
            times.append(now)
        return len(times) >= MOST_STRIKES

    def forgive(self, worker: str) -> None:
        """A result of `worker` was accepted."""
        self._times.pop(worker, None)

    def forgive_all(self) -> None:
        """The broker is to blame."""
        self._times.clear()
