"""The client of a round: a process that trains, and goes on from its last checkpoint when it was killed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from hetrain.public.errors import BrokerError, StorageError
from tests.campaign.installation import Installation
from tests.campaign.plan import UPDATES, Job
from tests.harness.cli_process import ForkedCommand
from tests.harness.processes import HANDBOOK

MICRO_BATCHES = 2
"""Micro-batches of an update."""
_CANNOT_BEGIN = (BrokerError.exit_code, StorageError.exit_code)

_OPTIONS = {
    Job.CLEAR: ("--engine", "clear"),
    Job.CLEAR_ASYNC: ("--engine", "clear", "--max-staleness", 1),
    Job.RLWE: ("--engine", "rlwe"),
}
_COMMON = (
    *("--batch-tokens", 64 * MICRO_BATCHES, "--micro-batch-tokens", 64, "--max-length", 32, "--in-flight", 2),
    *("--max-steps", UPDATES, "--save-steps", 1, "--seed", 1, "--lora-dropout", 0.1, "--learning-rate", 1e-3),
    "--json",
)


class Client:
    """A job's client, which runs once it is started, and can be killed and started again.

    Attributes:
        output: the job's output directory.
        statuses: exit statuses of its processes so far; None for one that was killed.
        repeats: how often it could not begin, and was started again.
    """

    def __init__(self, installation: Installation, job: Job, output: Path) -> None:
        self.output = output
        self.statuses: list[int | None] = []
        self.repeats = 0
        self._installation, self._job = installation, job
        self._directory = output.with_name(f"{output.name}.said")
        self._command: ForkedCommand | None = None
        self._updates_at_start = 0

    def start(self) -> None:
        """Starts it: from the last checkpoint if there is one, else anew."""
        self._updates_at_start = self.updates()
        said = self._directory / str(len(self.statuses))
        said.mkdir(parents=True)
        names = [path.name for path in self.output.glob("checkpoint-*")]
        resumes = any(re.fullmatch(r"checkpoint-\d+", name) for name in names)
        begin = ("--resume-from-checkpoint", "latest") if resumes else ("--overwrite-output-dir",)
        place = ("--model-name-or-path", self._installation.model, "--output-dir", self.output)
        words = ["submit", HANDBOOK, *place, *_OPTIONS[self._job], *_COMMON, *begin]
        self._command = ForkedCommand(words, self._installation.client_environment(), said, "/")

    def kill(self) -> None:
        """Kills its process."""
        assert self._command is not None
        self._command.kill()
        self.statuses.append(None)

    def has_ended(self, timeout_s: float) -> bool:
        """Whether its process has ended; waits for that so many seconds."""
        assert self._command is not None
        status = self._command.wait(timeout_s)
        if status is not None:
            self.statuses.append(status)
        return status is not None

    def could_not_begin(self) -> bool:
        """Whether its last process ended before a first update, without a broker or room on the disk."""
        return self.statuses[-1] in _CANNOT_BEGIN and self.updates() == self._updates_at_start

    def begin_again(self) -> None:
        """Starts it again, as a user does who has mended what kept it from beginning."""
        self.repeats += 1
        self.start()

    def updates(self) -> int:
        """Updates that have been recorded."""
        try:
            lines = (self.output / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return 0
        return len(lines) // MICRO_BATCHES

    def records(self) -> list[dict[str, object]]:
        """The lines of its metrics."""
        return [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]

    def errors(self) -> str:
        """What its processes have written to standard error."""
        paths = sorted(self._directory.glob("*/stderr"), key=lambda path: int(path.parent.name))
        return "".join(path.read_text(errors="replace") for path in paths)

    def remove(self) -> None:
        """Removes its files."""
        for path in (self.output, self._directory):
            shutil.rmtree(path, ignore_errors=True)
