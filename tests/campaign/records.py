"""What is kept of the rounds: one JSON file, written after every round, from which a campaign goes on."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from hetrain.public.disk import replace_text

FORMAT = 2
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Injected:
    """One fault of a round: what was planned, and what came of it.

    Attributes:
        outcome: ``struck``, ``missed`` (the job had ended, or there was nothing to strike) or ``left out``.
        what: what it did, in a few words.
    """

    kind: str
    detail: str
    after_update: int
    outcome: str
    what: str = ""


@dataclass(frozen=True)
class RoundRecord:
    """One round.

    Attributes:
        seconds: from the client's start to the end of the checks.
        violations: what is not as it must be; empty as a rule.
        said: the end of what the client wrote to standard error, where there is a violation.
        repeats: how often the client could not begin, and was started again.
    """

    number: int
    job: str
    seconds: float
    faults: tuple[Injected, ...]
    violations: tuple[str, ...] = ()
    said: str = ""
    repeats: int = 0


@dataclass
class Campaign:
    """All rounds of one seed.

    Attributes:
        commits: rounds by the commit that they ran on.
    """

    seed: int
    machine: dict[str, Any] = field(default_factory=environment)
    commits: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, str] = field(default_factory=dict)
    rounds: list[RoundRecord] = field(default_factory=list)

    def add(self, record: RoundRecord, commit: str) -> None:
        """Adds a round."""
        self.rounds.append(record)
        self.commits[commit] += 1

    @property
    def violated(self) -> list[RoundRecord]:
        """The rounds with violations."""
        return [each for each in self.rounds if each.violations]

    def write(self, path: Path) -> None:
        """Replaces the file at `path`; each round has a line of its own."""
        head = {
            "format": FORMAT,
            "seed": self.seed,
            "commits": dict(self.commits),
            "machine": self.machine,
            "left_out": self.left_out,
        }
        lines = ",\n".join(json.dumps(_compact(each), ensure_ascii=False) for each in self.rounds)
        replace_text(path, f'{json.dumps(head, ensure_ascii=False)[:-1]}, "rounds": [\n{lines}\n]}}\n')


def read_campaign(path: Path, seed: int) -> Campaign:
    """The campaign in the file at `path`, or a new one. Raises `ValueError` if it has another seed."""
    if not path.exists():
        return Campaign(seed)
    content = json.loads(path.read_text(encoding="utf-8"))
    if (content["format"], content["seed"]) != (FORMAT, seed):
        raise ValueError(f"{path} has the rounds of seed {content['seed']}, format {content['format']}")
    rounds = [
        RoundRecord(
            number=each["number"],
            job=each["job"],
            seconds=each["seconds"],
            faults=tuple(Injected(**fault) for fault in each["faults"]),
            violations=tuple(each.get("violations", ())),
            said=each.get("said", ""),
            repeats=each["repeats"],
        )
        for each in content["rounds"]
    ]
    return Campaign(seed, content["machine"], Counter(content["commits"]), content["left_out"], rounds)


def commit() -> str:
    """The commit that is checked out, with ``+`` where files differ from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=_ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _compact(record: RoundRecord) -> dict[str, Any]:
    return {name: value for name, value in asdict(record).items() if value not in ((), "")}
