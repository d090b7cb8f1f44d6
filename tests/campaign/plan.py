"""Which faults strike which job, and when: a pure function of the seed and the round's number."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """Kinds of faults."""

    WORKER_KILLED = "worker killed"
    WORKER_STOPPED = "worker stopped"
    CLIENT_KILLED = "client killed"
    BROKER_RESTARTED = "broker restarted"
    MEMORY_LOWERED = "memory lowered"
    CONNECTION_CUT = "connection cut"
    KEYS_DELETED = "keys deleted"
    MESSAGE_LOST = "message lost"
    MESSAGE_TWICE = "message twice"
    CLOCK_MOVED = "clock moved"
    DISK_FULL = "disk full"
    HINT_DAMAGED = "hint damaged"


class Job(StrEnum):
    """What is trained: an engine, and in what step."""

    CLEAR = "clear"
    CLEAR_ASYNC = "clear, asynchronous"
    RLWE = "rlwe"


UPDATES = 6
"""Updates of a job."""

KINDS = tuple(Kind)
DETAILS: dict[Kind, tuple[str, ...]] = {
    Kind.WORKER_KILLED: ("one", "one", "one", "all"),
    Kind.WORKER_STOPPED: ("one", "one", "one", "all"),
    Kind.CONNECTION_CUT: ("client up", "client down", "worker up", "worker down"),
    Kind.KEYS_DELETED: ("in", "out", "plan", "fin", "lease", "tries", "done", "alive", "workers", "all"),
    Kind.MESSAGE_LOST: ("task", "completion"),
    Kind.MESSAGE_TWICE: ("task", "completion"),
    # By its clock the broker ends what is blocked: set back, it is silent until a client gives it up (30 s).
    Kind.CLOCK_MOVED: ("forward", "forward", "forward", "back"),
    Kind.HINT_DAMAGED: ("bit", "shorter", "empty", "gone"),
}
"""What a fault of a kind is done to, or how."""

# Longest duration in seconds; a fault that is not named here is over at once.
_LONGEST_S = {
    Kind.WORKER_STOPPED: 6.0,
    Kind.BROKER_RESTARTED: 1.0,
    Kind.MEMORY_LOWERED: 3.0,
    Kind.DISK_FULL: 2.0,
}
_SECOND_FAULT = 0.35
_LONGEST_DELAY_S = 0.25
_JOBS = {Job.CLEAR: 0.76, Job.CLEAR_ASYNC: 0.10, Job.RLWE: 0.14}


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: what happens.
        detail: to what, or how: one of `DETAILS`.
        after_update: it strikes when so many updates have been recorded; 0: as soon as the job is there.
        delay_s: seconds after that.
        lasts_s: seconds until it is undone.
        amount: from 0 to 1: which worker, which key, how far.
    """

    kind: Kind
    detail: str
    after_update: int
    delay_s: float
    lasts_s: float
    amount: float


@dataclass(frozen=True)
class Round:
    """A job and its faults, in the order in which they strike."""

    number: int
    job: Job
    faults: tuple[Fault, ...]


def plan_round(seed: int, number: int) -> Round:
    """Round `number`, from 0 on. Of the first rounds each has another kind of fault."""
    chance = random.Random(f"hetrain campaign {seed} {number}")
    first = KINDS[number] if number < len(KINDS) else chance.choice(KINDS)
    kinds = [first]
    if number >= len(KINDS) and chance.random() < _SECOND_FAULT:
        kinds.append(chance.choice([kind for kind in KINDS if kind is not first]))
    job = chance.choices(list(_JOBS), list(_JOBS.values()))[0]
    faults = sorted(
        (_fault(kind, chance) for kind in kinds), key=lambda each: (each.after_update, each.delay_s)
    )
    return Round(number, Job.RLWE if Kind.HINT_DAMAGED in kinds else job, tuple(faults))


def _fault(kind: Kind, chance: random.Random) -> Fault:
    longest = _LONGEST_S.get(kind, 0.0)
    return Fault(
        kind=kind,
        detail=chance.choice(DETAILS.get(kind, ("",))),
        # Hints are damaged before the job begins: it maps the files, and one that is cut then ends it.
        after_update=0 if kind is Kind.HINT_DAMAGED else chance.randrange(UPDATES - 1),
        delay_s=round(chance.uniform(0, _LONGEST_DELAY_S), 3),
        # Short ones are more frequent: long ones make a round long, and are much alike.
        lasts_s=round(longest * chance.random() ** 2, 3),
        amount=round(chance.random(), 6),
    )
