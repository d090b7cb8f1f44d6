"""Fifty rounds of the fault campaign, of two seeds, whose first twelve each have every kind of fault."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaign.plan import KINDS
from tests.campaign.records import read_campaign

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 25
OUTCOMES = {"struck", "missed", "left out"}


@pytest.mark.parametrize("seed", [1, 2])
def test_every_kind_of_fault_strikes_a_job_and_nothing_is_lost(seed: int, tmp_path: Path) -> None:
    records, report = tmp_path / "campaign.json", tmp_path / "campaign.html"
    command = [sys.executable, "-m", "tests.campaign", "--seed", seed, "--rounds", ROUNDS]
    done = subprocess.run(
        [*map(str, command), "--json", str(records), "--html", str(report)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    rounds = read_campaign(records, seed).rounds
    assert len(rounds) == ROUNDS
    assert [each.faults[0].kind for each in rounds[: len(KINDS)]] == list(KINDS)
    assert {fault.outcome for each in rounds for fault in each.faults} <= OUTCOMES
    assert sum(each.faults[0].outcome == "struck" for each in rounds) >= ROUNDS // 2
    assert "No round has a violation" in report.read_text()
