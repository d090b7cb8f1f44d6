"""One round: starts a job, lets its faults strike when they are due, undoes them, and checks."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic

import redis

from tests.campaign.checks import ADAPTER, Patience, Processes, check_keys, check_result, check_workers
from tests.campaign.client import Client
from tests.campaign.faults import STRIKES, Scene, Struck, impossible
from tests.campaign.installation import Installation
from tests.campaign.plan import Fault, Job, Kind, Round
from tests.campaign.records import Injected, RoundRecord

DEADLINE_S = 120.0
"""Seconds after which a job that has not ended hangs; see `Patience`."""
_POLL_S = 0.01
_SAID = 3000


class ActiveFault:
    """A fault that waits for its time, then strikes, then is undone."""

    def __init__(self, fault: Fault, left_out: bool) -> None:
        self._fault = fault
        self._outcome = "left out" if left_out else "waits"
        self._due_at: float | None = None
        self._struck = Struck("")
        self._until = 0.0

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do or to undo."""
        return self._outcome not in ("waits", "lasts")

    def advance(self, scene: Scene, updates: int, has_begun: bool) -> None:
        """Does what is due now."""
        now = monotonic()
        if self._outcome == "lasts" and now >= self._until:
            self.undo()
        if self._outcome != "waits":
            return
        if self._due_at is None and has_begun and updates >= self._fault.after_update:
            self._due_at = now + self._fault.delay_s
        if self._due_at is not None and now >= self._due_at:
            self.strike(scene)

    def strike(self, scene: Scene) -> None:
        """Strikes, if there is something to strike."""
        if self.is_over:
            return
        try:
            struck = STRIKES[self._fault.kind](scene, self._fault)
        except redis.ConnectionError:
            return  # the broker is away, by another fault; so it waits
        if struck is not None:
            self._struck, self._outcome, self._until = struck, "lasts", monotonic() + self._fault.lasts_s

    def undo(self) -> None:
        """Undoes what it did, if it lasts."""
        if self._outcome == "lasts":
            self._outcome = "struck"
            with suppress(redis.ConnectionError):  # a broker that was started again has forgotten it, too
                self._struck.undo()

    def record(self) -> Injected:
        """What came of it, once the round is over."""
        outcome = "missed" if self._outcome == "waits" else self._outcome
        fault = self._fault
        return Injected(fault.kind.value, fault.detail, fault.after_update, outcome, self._struck.what)


class Rounds:
    """Runs rounds on one installation, one after the other.

    Raises:
        RuntimeError: from the constructor, when a job fails that no fault disturbs.
    """

    def __init__(self, installation: Installation) -> None:
        self.installation = installation
        self.left_out = impossible(installation)
        self._references: dict[Job, Path] = {}
        self._run_undisturbed(Job.CLEAR)
        self._processes = Processes(installation)
        for job in Job:
            self._run_undisturbed(job)

    def run(self, planned: Round) -> RoundRecord:
        """Runs one round, to the end of its checks."""
        begin = monotonic()
        scene = self._scene(planned.job, f"round-{planned.number}", f"{planned}")
        moves_clock = any(fault.kind is Kind.CLOCK_MOVED for fault in planned.faults)
        if moves_clock:
            self._use_clock(self.installation.clock.environment())
        faults = [ActiveFault(fault, fault.kind in self.left_out) for fault in planned.faults]
        for fault, active in zip(planned.faults, faults, strict=True):
            if fault.kind is Kind.HINT_DAMAGED:
                active.strike(scene)
        try:
            violations = self._drive(scene, faults) or self._check(scene, self._references.get(planned.job))
        except redis.RedisError as error:
            violations = [f"the broker fails: {error}"]
            scene.client.kill()
        said = scene.client.errors()[-_SAID:] if violations else ""
        scene.client.remove()
        if moves_clock and not violations:
            self._use_clock({})
        return RoundRecord(
            number=planned.number,
            job=planned.job.value,
            seconds=round(monotonic() - begin, 2),
            repeats=scene.client.repeats,
            faults=tuple(each.record() for each in faults),
            violations=tuple(violations),
            said=said,
        )

    def _use_clock(self, environment: Mapping[str, str]) -> None:
        """Starts another broker, and waits until it has the workers; a round notices if they do not come.

        Most rounds have one without libfaketime: a broker under it once stopped answering; why is unknown.
        """
        self.installation.broker.replace(environment)
        list(check_workers(self.installation))

    def _scene(self, job: Job, name: str, seed: str) -> Scene:
        client = Client(self.installation, job, self.installation.disk.path / name)
        return Scene(self.installation, client, random.Random(seed))

    def _drive(self, scene: Scene, faults: Sequence[ActiveFault]) -> list[str]:
        """Runs the job to its end; returns a violation if that does not come."""
        scene.client.start()
        patience = Patience(DEADLINE_S)
        has_begun = hangs = False
        while not (ended := scene.client.has_ended(_POLL_S)) or scene.client.could_not_begin():
            if hangs := patience.is_over():
                break
            if ended:
                for each in faults:
                    each.undo()
                scene.client.begin_again()
            has_begun = has_begun or bool(scene.job_keys())
            updates = scene.client.updates()
            for each in faults:
                each.advance(scene, updates, has_begun)
        for each in faults:
            each.undo()
        for relay in self.installation.relays.values():
            relay.keep_all()
        if not hangs:
            return []
        scene.jobs_killed.update(name.split(":")[1] for name in scene.job_keys())
        scene.client.kill()
        return [f"no end after {DEADLINE_S:g} s", *self._clean(scene)]

    def _check(self, scene: Scene, reference: Path | None) -> list[str]:
        return [*check_result(scene.client, reference), *self._clean(scene)]

    def _clean(self, scene: Scene) -> list[str]:
        """What has to hold of the installation, which then is ready for another round."""
        return [
            *check_workers(self.installation),
            *self._processes.check(),
            *check_keys(scene.admin, scene.jobs_killed),
        ]

    def _run_undisturbed(self, job: Job) -> None:
        scene = self._scene(job, "undisturbed", "")
        reference = self._references.get(job)
        if broken := self._drive(scene, ()) or list(check_result(scene.client, reference)):
            raise RuntimeError(f"{job}, undisturbed: {'; '.join(broken)}\n{scene.client.errors()}")
        if job is Job.CLEAR and reference is None:
            self._references[job] = self.installation.directory / "reference.safetensors"
            shutil.copy(scene.client.output / ADAPTER, self._references[job])
        scene.client.remove()
