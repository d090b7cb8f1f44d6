"""The fault campaign.

Ends with 1 if there was a violation. A campaign that was stopped goes on where it was: --rounds counts the
rounds that the JSON file has already. --only repeats a round, and prints what came of it.
"""

from __future__ import annotations

import argparse
import ctypes
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from hetrain.public.disk import replace_text
from tests.campaign.installation import installation
from tests.campaign.plan import plan_round
from tests.campaign.records import Campaign, RoundRecord, commit, read_campaign
from tests.campaign.report import line, page
from tests.campaign.rounds import Rounds

_PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    """Runs the command; returns its exit status."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # What a process leaves behind becomes this one's child, where the checks find it.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    campaign = (
        Campaign(options.seed) if options.only is not None else read_campaign(options.json, options.seed)
    )
    if options.only is not None:
        for _ in run(campaign, [options.only]):
            pass
        return int(bool(campaign.violated))
    for _ in run(campaign, range(len(campaign.rounds), options.rounds)):
        campaign.write(options.json)
    if options.html is not None:
        replace_text(options.html, page(campaign))
    return int(bool(campaign.violated))


def run(campaign: Campaign, numbers: Iterable[int]) -> Iterator[RoundRecord]:
    """Runs rounds of a campaign, adds and prints each, and yields it."""
    numbers, code = list(numbers), commit()
    if not numbers:
        return
    while numbers:
        with installation() as world:
            rounds = Rounds(world)
            campaign.left_out = {kind.value: why for kind, why in rounds.left_out.items()}
            for number in list(numbers):
                record = rounds.run(plan_round(campaign.seed, number))
                numbers.remove(number)
                campaign.add(record, code)
                sys.stdout.write(line(record))
                sys.stdout.flush()
                yield record
                if record.violations:
                    break  # what a violation leaves must not be taken for another one


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000, help="how many in all, those in --json included")
    parser.add_argument("--seed", type=int, default=1, help="determines all faults")
    parser.add_argument("--json", type=Path, default=Path("campaign.json"), help="written after every round")
    parser.add_argument("--html", type=Path, help="the report, written at the end")
    parser.add_argument("--only", type=int, metavar="ROUND", help="repeat this round; no file is written")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
