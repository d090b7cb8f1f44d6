"""One round of the fault campaign for each kind of fault: twelve, in about 90 s of two busy cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.campaign.plan import KINDS
from tests.campaign.records import read_campaign

ROOT = Path(__file__).resolve().parents[2]
SEED = 1
OUTCOMES = {"struck", "missed", "left out"}


def test_every_kind_of_fault_strikes_a_job_and_nothing_is_lost(tmp_path: Path) -> None:
    records, report = tmp_path / "campaign.json", tmp_path / "campaign.html"
    command = [sys.executable, "-m", "tests.campaign", "--seed", SEED, "--rounds", len(KINDS)]
    done = subprocess.run(
        [*map(str, command), "--json", str(records), "--html", str(report)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    rounds = read_campaign(records, SEED).rounds
    assert [each.faults[0].kind for each in rounds] == list(KINDS)
    assert {fault.outcome for each in rounds for fault in each.faults} <= OUTCOMES
    assert sum(each.faults[0].outcome == "struck" for each in rounds) >= len(KINDS) // 2
    assert "No round has a violation" in report.read_text()
