"""Usage: ``python -m tests.fuzz --cases 100000 --seed 1 --json FILE``; an interrupted run goes on from FILE.

One case is repeated, with its input and its traceback, by ``--target NAME --seed SEED --case NUMBER``.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

from tests.fuzz.run import Target, input_of, open_target, run_cases
from tests.fuzz.targets import TARGETS

_SLICE_S = 40.0
_SHOWN_BYTES = 3000


def main() -> int:
    """The command line: 0 if nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzzes parsers")
    parser.add_argument("--cases", type=int, default=1000, help="of each target")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="default: all of them")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where results are kept, and taken up again")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for all of it, about")
    parser.add_argument("--case", type=int, help="repeats this one")
    options = parser.parse_args()
    chosen = [TARGETS[name] for name in options.target or TARGETS]
    if options.case is not None:
        if len(chosen) != 1:
            parser.error("--case needs one --target")
        return _repeat(chosen[0], options.seed, options.case)
    return _run(chosen, options.seed, options.cases, options.json, monotonic() + options.seconds)


def _run(chosen: list[Target], seed: int, cases: int, file: Path | None, end: float) -> int:
    results = _read(file, seed)
    left = list(chosen)
    while left and monotonic() < end:  # each has its turn, so that slow ones do not keep others waiting
        for target in list(left):
            done = results["targets"].setdefault(target.name, {"cases": 0, "seconds": 0.0, "findings": []})
            begin = monotonic()
            seconds = min(_SLICE_S, end - begin)
            if done["cases"] >= cases or seconds <= 0:
                left.remove(target)
                continue
            done["cases"], findings = run_cases(target, seed, done["cases"], cases, seconds)
            done["seconds"] = round(done["seconds"] + monotonic() - begin, 1)
            known = {finding["problem"] for finding in done["findings"]}
            for finding in findings:
                if finding.problem not in known:
                    done["findings"].append(asdict(finding))
                    repeat = f"--target {target.name} --seed {seed} --case {finding.case}"
                    print(f"FOUND {finding.problem}: python -m tests.fuzz {repeat}", flush=True)
            if file is not None:
                file.write_text(json.dumps(results, indent=1) + "\n")
    for target in chosen:
        done = results["targets"][target.name]
        print(f"{target.name}: {done['cases']} cases, {done['seconds']} s, {len(done['findings'])} findings")
    return 1 if any(results["targets"][target.name]["findings"] for target in chosen) else 0


def _read(file: Path | None, seed: int) -> dict[str, Any]:
    if file is not None and file.exists():
        results: dict[str, Any] = json.loads(file.read_text())
        if results["seed"] != seed:
            sys.exit(f"{file} is of seed {results['seed']}")
        return results
    return {"seed": seed, "targets": {}}


def _repeat(target: Target, seed: int, number: int) -> int:
    with ExitStack() as stack:
        opened = open_target(target, stack)
        data = input_of(target, opened, seed, number)
        print(f"{len(data)} bytes: {data[:_SHOWN_BYTES]!r}{' ...' if len(data) > _SHOWN_BYTES else ''}")
        try:
            print(f"returns {str(opened.run(data))[:_SHOWN_BYTES]!r}")
        except Exception as error:
            traceback.print_exc()
            print(f"its text: {str(error)[:_SHOWN_BYTES]!r}")
            return 0 if isinstance(error, target.allowed) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
