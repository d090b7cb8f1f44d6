"""The faults: each is a function that strikes, and returns what it did and how that is undone."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import redis

from hetrain.public.protocol.messages import QUEUE
from hetrain.public.protocol.registration import LANES, REGISTRY_KEY, lane_queue
from tests.campaign.client import Client
from tests.campaign.installation import Installation
from tests.campaign.plan import Fault, Kind

# Longer than anything but blobs of the tiny model.
_BLOB_BYTES = 6000
_LARGEST_JUMP_S = 7200
_LARGEST_SPARE = 1 << 16
_STEAL_S = 1
_OF_A_JOB = "hetrain:*:*"


@dataclass(frozen=True)
class Struck:
    """What a fault did.

    Attributes:
        what: in a few words.
        undo: ends it; called after the fault's duration.
    """

    what: str
    undo: Callable[[], object] = field(default=lambda: None)


@dataclass(frozen=True)
class Scene:
    """What a fault can strike.

    Attributes:
        jobs_killed: names of jobs whose clients were killed, which leave keys that expire.
        armed: what waits for an opportunity.
    """

    installation: Installation
    client: Client
    chance: random.Random
    jobs_killed: set[str] = field(default_factory=set)
    armed: set[str] = field(default_factory=set)

    @property
    def admin(self) -> redis.Redis:
        """A client of the broker."""
        return self.installation.broker.admin

    def job_keys(self) -> list[str]:
        """All keys of jobs."""
        names = (name.decode() for name in self.admin.keys(_OF_A_JOB))
        return sorted(name for name in names if name != REGISTRY_KEY)


Strike = Callable[[Scene, Fault], Struck | None]
"""None: there is nothing to strike yet; it is to be tried again."""


def _workers(scene: Scene, fault: Fault) -> list[int]:
    pids = sorted(scene.installation.workers.running())
    return pids if fault.detail == "all" else [pids[int(fault.amount * len(pids))]] if pids else []


def _kill_workers(scene: Scene, fault: Fault) -> Struck | None:
    chosen = _workers(scene, fault)
    for pid in chosen:
        scene.installation.workers.kill(pid)
    return Struck(f"{len(chosen)} killed") if chosen else None


def _stop_workers(scene: Scene, fault: Fault) -> Struck | None:
    chosen = _workers(scene, fault)

    def send(number: signal.Signals) -> None:
        for pid in chosen:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    send(signal.SIGSTOP)
    return Struck(f"{len(chosen)} stopped", lambda: send(signal.SIGCONT)) if chosen else None


def _kill_client(scene: Scene, fault: Fault) -> Struck:
    # Raises while the broker is away: a client that starts then ends at once, with status 7.
    names = scene.job_keys()
    scene.client.kill()
    scene.jobs_killed.update(name.split(":")[1] for name in [*names, *scene.job_keys()])
    scene.client.start()
    return Struck("killed and started again")


def _restart_broker(scene: Scene, fault: Fault) -> Struck:
    broker = scene.installation.broker
    broker.kill()
    return Struck(f"away for {fault.lasts_s:.1f} s", broker.start)


def _lower_memory(scene: Scene, fault: Fault) -> Struck:
    broker, spare = scene.installation.broker, int(fault.amount * _LARGEST_SPARE)
    broker.limit_memory(spare)
    return Struck(f"{spare >> 10} KiB left", lambda: broker.limit_memory(None))


def _cut_connection(scene: Scene, fault: Fault) -> Struck | None:
    party, direction = fault.detail.split()
    relay = scene.installation.relays[party]
    if fault.detail not in scene.armed:
        scene.armed.add(fault.detail)
        relay.cut_next(is_request=direction == "up", nbytes=_BLOB_BYTES)
    return None if relay.will_cut else Struck(f"a blob of a {party}, {direction}")


def _delete_keys(scene: Scene, fault: Fault) -> Struck | None:
    if fault.detail == "workers":
        return Struck("registrations") if scene.admin.delete(REGISTRY_KEY) else None
    names = [name for name in scene.job_keys() if fault.detail in ("all", name.split(":")[2])]
    if fault.detail != "all" and names:
        names = [names[int(fault.amount * len(names))]]
    count = scene.admin.delete(*names) if names else 0
    return Struck(f"{count} of kind {fault.detail}") if count else None


def _steal(scene: Scene, fault: Fault) -> tuple[str, bytes] | None:
    """Takes the next message of a kind: of those that wait for one, the broker serves who waited longest."""
    if fault.detail == "task":
        lanes = [lane_queue(QUEUE, scene.installation.model.name, lane) for lane in range(LANES)]
        taken = scene.admin.brpop([QUEUE, *lanes], timeout=_STEAL_S)
    else:
        jobs = {name.split(":")[1] for name in scene.job_keys()} - scene.jobs_killed
        lists = [f"hetrain:{job}:done" for job in jobs]
        taken = scene.admin.blpop(lists, timeout=_STEAL_S) if lists else None
    return (taken[0].decode(), taken[1]) if taken else None


def _lose_message(scene: Scene, fault: Fault) -> Struck | None:
    return Struck(f"a {fault.detail}") if _steal(scene, fault) else None


def _repeat_message(scene: Scene, fault: Fault) -> Struck | None:
    if (taken := _steal(scene, fault)) is None:
        return None
    name, message = taken
    push = scene.admin.lpush if fault.detail == "task" else scene.admin.rpush
    push(name, message, message)
    if fault.detail == "completion":
        scene.admin.expire(name, 900)
    return Struck(f"a {fault.detail}")


def _move_clock(scene: Scene, fault: Fault) -> Struck:
    seconds = round(fault.amount * _LARGEST_JUMP_S) * (1 if fault.detail == "forward" else -1)
    scene.installation.clock.move(seconds)
    return Struck(f"{seconds:+d} s")


def _fill_disk(scene: Scene, fault: Fault) -> Struck:
    disk = scene.installation.disk
    disk.fill(leave := int(fault.amount * _LARGEST_SPARE))
    return Struck(f"{leave >> 10} KiB left", disk.free)


def _damage_hint(scene: Scene, fault: Fault) -> Struck | None:
    files = sorted(scene.installation.hints.glob("*.hint"))
    path = files[int(fault.amount * len(files))]
    content = bytearray(path.read_bytes())
    if fault.detail == "gone":
        path.unlink()
    elif fault.detail == "bit":
        content[scene.chance.randrange(len(content))] ^= 1 << scene.chance.randrange(8)
        path.write_bytes(content)
    else:
        path.write_bytes(content[: scene.chance.randrange(len(content)) if fault.detail == "shorter" else 0])
    return Struck(f"{fault.detail}")


STRIKES: Mapping[Kind, Strike] = {
    Kind.WORKER_KILLED: _kill_workers,
    Kind.WORKER_STOPPED: _stop_workers,
    Kind.CLIENT_KILLED: _kill_client,
    Kind.BROKER_RESTARTED: _restart_broker,
    Kind.MEMORY_LOWERED: _lower_memory,
    Kind.CONNECTION_CUT: _cut_connection,
    Kind.KEYS_DELETED: _delete_keys,
    Kind.MESSAGE_LOST: _lose_message,
    Kind.MESSAGE_TWICE: _repeat_message,
    Kind.CLOCK_MOVED: _move_clock,
    Kind.DISK_FULL: _fill_disk,
    Kind.HINT_DAMAGED: _damage_hint,
}


def impossible(installation: Installation) -> dict[Kind, str]:
    """Kinds that cannot be had on this machine, and why."""
    reasons = {}
    if installation.clock.library is None:
        reasons[Kind.CLOCK_MOVED] = "libfaketime is not installed"
    if not installation.disk.is_mounted:
        reasons[Kind.DISK_FULL] = "no file system can be mounted here"
    return reasons
