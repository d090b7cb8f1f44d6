"""The fault campaign's plan, its records, and the report that is committed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.campaign.plan import DETAILS, KINDS, UPDATES, Job, Kind, plan_round
from tests.campaign.records import Campaign, Injected, RoundRecord, read_campaign
from tests.campaign.report import page, rows_by_job, rows_by_kind

RESULTS = sorted((Path(__file__).parents[1] / "campaign" / "results").glob("*.json"))


def test_a_plan_is_a_function_of_seed_and_number_alone() -> None:
    backwards = [plan_round(7, number) for number in reversed(range(200))]
    assert [plan_round(7, number) for number in range(200)] == backwards[::-1]
    assert len({repr(plan_round(seed, 50).faults) for seed in range(100)}) == 100


def test_the_first_rounds_have_every_kind_and_a_thousand_every_variant() -> None:
    rounds = [plan_round(1, number) for number in range(1000)]
    assert [each.faults[0].kind for each in rounds[: len(KINDS)]] == list(KINDS)
    assert all(len(each.faults) == 1 for each in rounds[: len(KINDS)])
    faults = [fault for each in rounds for fault in each.faults]
    variants = {(kind, detail) for kind in KINDS for detail in DETAILS.get(kind, ("",))}
    assert {(fault.kind, fault.detail) for fault in faults} == variants
    assert {fault.after_update for fault in faults} == set(range(UPDATES - 1))
    assert {len(each.faults) for each in rounds} == {1, 2}
    assert {each.job for each in rounds} == set(Job)
    for each in rounds:
        times = [(fault.after_update, fault.delay_s) for fault in each.faults]
        assert times == sorted(times)
        assert len({fault.kind for fault in each.faults}) == len(each.faults)
        if any(fault.kind is Kind.HINT_DAMAGED for fault in each.faults):
            assert each.job is Job.RLWE


def some_rounds() -> Campaign:
    campaign = Campaign(3, left_out={"clock moved": "of no library"})
    killed = Injected("worker killed", "all", 2, "struck", "2 killed")
    moved = Injected("clock moved", "back", 0, "left out")
    campaign.add(RoundRecord(0, "clear", 2.0, (killed,)), "abc")
    campaign.add(RoundRecord(1, "rlwe", 4.0, (killed, moved), ("<lost>",), "it said & ended"), "abc")
    campaign.add(
        RoundRecord(2, "clear", 3.0, (Injected("worker killed", "one", 4, "missed"),), repeats=2), "def"
    )
    return campaign


def test_a_campaign_goes_on_from_its_file(tmp_path: Path) -> None:
    campaign, path = some_rounds(), tmp_path / "campaign.json"
    assert read_campaign(path, 3).rounds == []
    campaign.write(path)
    again = read_campaign(path, 3)
    assert (again.rounds, again.commits, again.left_out) == (
        campaign.rounds,
        campaign.commits,
        campaign.left_out,
    )
    with pytest.raises(ValueError, match="seed 3"):
        read_campaign(path, 4)


def test_a_report_counts_what_struck_and_names_what_was_violated() -> None:
    campaign = some_rounds()
    killed = rows_by_kind(campaign)[KINDS.index(Kind.WORKER_KILLED)]
    assert killed.outcomes == Counter(struck=2, missed=1)
    assert (killed.violated, killed.median_s, killed.longest_s) == (1, 3.0, 4.0)
    assert killed.details == {"all": 2}
    assert [row.outcomes["rounds"] for row in rows_by_job(campaign)] == [2, 0, 1]
    text = page(campaign)
    assert "&lt;lost&gt;" in text
    assert "--seed 3 --only 1" in text
    assert "No round has a violation" not in text
    assert "In 1 rounds the client could not begin" in text


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_what_is_committed_can_be_repeated(path: Path) -> None:
    campaign = read_campaign(path, json.loads(path.read_text())["seed"])
    assert path.with_suffix(".html").read_text() == page(campaign)
    assert [each.number for each in campaign.rounds] == list(range(len(campaign.rounds)))
    for record in campaign.rounds:
        planned = plan_round(campaign.seed, record.number)
        assert record.job == planned.job
        assert [(f.kind, f.detail, f.after_update) for f in record.faults] == [
            (f.kind, f.detail, f.after_update) for f in planned.faults
        ]
