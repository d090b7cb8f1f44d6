"""What a job costs on paper: formulas, their edges, and the verdict."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest

from hetrain.inspection.estimate import Link, MachineCosts, Memory, Rates, Verdict, Work, estimate
from hetrain.public.errors import UsageError
from hetrain.public.quantities import (
    parse_bits_per_second,
    say_bits_per_second,
    say_bytes,
    say_seconds,
)

WORK = Work(tokens=1000, bytes_up=3e6, bytes_down=2e6, weights=10**8, products=10, micro_batches=4, at_once=2)
RATES = Rates(operations_per_s=1.2e12, egress_price=0.1)
COSTS = MachineCosts(client_s=0.004, local_s=0.06, cores=2)
LINK = Link(1e9)
ROOM = Memory(client=1e9, local=2e9, limit=4e9)


def test_each_stage_takes_its_total_over_its_rate() -> None:
    found = estimate(WORK, replace(LINK, round_trip_s=0.01), RATES, COSTS, ROOM)
    assert (found.up_s, found.down_s) == pytest.approx((24, 16))
    assert (found.client_s, found.local_s) == pytest.approx((2, 30))
    assert found.worker_s == pytest.approx(12 * 1e8 * 1000 / 1.2e12)
    assert found.waiting_s == pytest.approx(2 * 0.01 * 10 * 4)
    assert (found.job_s, found.bottleneck) == (pytest.approx(24), "up")
    assert (found.egress_bytes, found.egress_usd) == pytest.approx((2e9, 0.2))
    assert found.verdict is Verdict.OUTSOURCE
    assert "24 s over this link, and training takes 30 s here" in found.sentence


def test_one_micro_batch_at_a_time_takes_the_sum() -> None:
    found = estimate(replace(WORK, at_once=1), LINK, RATES, COSTS, ROOM)
    assert (found.job_s, found.bottleneck) == (pytest.approx(24 + 16 + 2 + 1), "overlap")
    assert found.verdict is Verdict.TRAIN_LOCALLY
    assert "Train locally, outsourcing does not pay here" in found.sentence


@pytest.mark.parametrize("link", [1e8, 1e9, 7e10])
@pytest.mark.parametrize("at_once", [1, 2, 8])
@pytest.mark.parametrize("round_trip", [0.0, 0.02])
def test_at_the_break_even_link_both_take_as_long(link: float, at_once: int, round_trip: float) -> None:
    work = replace(WORK, at_once=at_once)
    even = estimate(work, Link(link, round_trip), RATES, COSTS, ROOM).break_even_bits
    assert even is not None
    at_even = estimate(work, Link(even, round_trip), RATES, COSTS, ROOM)
    assert at_even.job_s == pytest.approx(at_even.local_s)
    assert estimate(work, Link(1.01 * even, round_trip), RATES, COSTS, ROOM).verdict is Verdict.OUTSOURCE
    assert estimate(work, Link(0.99 * even, round_trip), RATES, COSTS, ROOM).verdict is Verdict.TRAIN_LOCALLY


@pytest.mark.parametrize(
    ("rates", "costs", "link", "at_once", "says"),
    [
        (RATES, replace(COSTS, client_s=0.061), LINK, 2, "the client's own part takes"),
        (replace(RATES, operations_per_s=1e10), COSTS, LINK, 2, "the workers take"),
        (RATES, COSTS, Link(1e9, 10.0), 1, "raise `in_flight`"),
    ],
)
def test_where_no_link_helps_there_is_no_break_even(
    rates: Rates, costs: MachineCosts, link: Link, at_once: int, says: str
) -> None:
    found = estimate(replace(WORK, at_once=at_once), link, rates, costs, ROOM)
    assert found.break_even_bits is None
    assert found.verdict is Verdict.TRAIN_LOCALLY
    assert says in found.sentence
    # Even an endless link changes nothing.
    endless = estimate(replace(WORK, at_once=at_once), replace(link, bits_per_s=math.inf), rates, costs, ROOM)
    assert (endless.up_s, endless.down_s) == (0, 0)
    assert endless.verdict is Verdict.TRAIN_LOCALLY


def test_over_an_endless_link_only_computing_takes_time() -> None:
    found = estimate(WORK, Link(math.inf), RATES, COSTS, ROOM)
    assert (found.job_s, found.bottleneck) == (pytest.approx(2), "client")
    assert found.verdict is Verdict.OUTSOURCE


def test_no_tokens_are_nothing_to_do() -> None:
    found = estimate(replace(WORK, tokens=0, micro_batches=0), LINK, RATES, COSTS, ROOM)
    assert (found.job_s, found.local_s, found.egress_usd) == (0, 0, 0)
    assert (found.verdict, found.break_even_bits) == (Verdict.NOTHING_TO_DO, None)


def test_nothing_outsourced_pays_at_every_link() -> None:
    kept = replace(WORK, bytes_up=0, bytes_down=0, weights=0, products=0)
    assert estimate(kept, LINK, RATES, COSTS, ROOM).break_even_bits == 0


def test_a_machine_that_was_not_measured_leaves_the_verdict_open() -> None:
    found = estimate(WORK, LINK, RATES)
    assert (found.client_s, found.local_s, found.break_even_bits) == (None, None, None)
    assert found.job_s == pytest.approx(24)
    assert found.verdict is Verdict.UNDECIDED


@pytest.mark.parametrize("link", [1e7, 1e12])
def test_memory_comes_first(link: float) -> None:
    expected = {
        (True, True): Verdict.OUTSOURCE if link > 1e9 else Verdict.TRAIN_LOCALLY,
        (True, False): Verdict.OUTSOURCE_FOR_MEMORY,
        (False, True): Verdict.TRAIN_LOCALLY,
        (False, False): Verdict.NO_MEMORY,
    }
    for client, local in product((True, False), repeat=2):
        memory = Memory(1e9 if client else 1e10, 2e9 if local else 2e10, 4e9)
        found = estimate(WORK, Link(link), RATES, COSTS, memory)
        assert found.verdict is expected[client, local]
        assert ("of memory" in found.sentence) == (not (client and local))


@pytest.mark.parametrize(
    ("field", "work", "link", "rates", "costs"),
    [
        ("cores", WORK, LINK, RATES, replace(COSTS, cores=0)),
        ("link", WORK, Link(0.0), RATES, COSTS),
        ("worker_speed", WORK, LINK, replace(RATES, operations_per_s=0.0), COSTS),
        ("in_flight", replace(WORK, at_once=0), LINK, RATES, COSTS),
        ("tokens", replace(WORK, tokens=-1), LINK, RATES, COSTS),
        ("egress_price", WORK, LINK, replace(RATES, egress_price=-1.0), COSTS),
        ("round_trip_ms", WORK, Link(1e9, math.inf), RATES, COSTS),
    ],
)
def test_what_makes_no_sense_is_named(
    field: str, work: Work, link: Link, rates: Rates, costs: MachineCosts
) -> None:
    with pytest.raises(UsageError) as caught:
        estimate(work, link, rates, costs)
    assert caught.value.field == field
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("1gbit", 1e9),
        ("100mbit", 1e8),
        ("2.5gbit", 2.5e9),
        (" 2.5 Gbit/s ", 2.5e9),
        ("10Gbps", 1e10),
        ("64kbits", 64e3),
        (".5tbit", 5e11),
        ("8bit", 8),
    ],
)
def test_rates_of_links(text: str, bits: float) -> None:
    assert parse_bits_per_second(text, field="link") == pytest.approx(bits)


@pytest.mark.parametrize(
    "text", ["", "1", "gbit", "1MB", "1 GB/s", "-1gbit", "0gbit", "1e9bit", "1gbit 2", "nan"]
)
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bits_per_second(text, field="link")
    assert caught.value.field == "link"
    assert "100mbit" in caught.value.hint


def test_figures_are_written_as_they_are_read() -> None:
    assert [say_seconds(each) for each in (0, 12, 200, 18000, 864000)] == [
        "0 s",
        "12 s",
        "3.3 min",
        "5 h",
        "10 days",
    ]
    assert [say_bytes(each) for each in (12, 2.08e9, 3.1e11)] == ["12 B", "2.1 GB", "310 GB"]
    assert say_bits_per_second(2.5e9) == "2.5 Gbit/s"
    assert say_bits_per_second(math.inf) == "an endless rate"
    assert say_seconds(math.inf) == "forever"
