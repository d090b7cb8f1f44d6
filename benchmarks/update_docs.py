"""Writes figures into the documentation: ``python -m benchmarks.update_docs``.

A generated part of a document stands between ``<!-- begin: COMMAND -->`` and ``<!-- end -->``, where the
command is what makes its figures. ``docs/figures/asynchrony.svg`` is drawn from the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib as mpl

from benchmarks import asynchrony, broker, corrections, lockstep, offload, plots, projection, scaling
from benchmarks.hardware import ClientModel, WorkerModel
from benchmarks.report import RESULTS

DOCS = Path(__file__).parents[1] / "docs"
DOCUMENTS = (DOCS / "scaling.md", DOCS / "asynchronous.md", DOCS / "performance.md")
_PART = re.compile(r"<!-- begin: (?P<name>.+?) -->\n.*?<!-- end -->", re.DOTALL)


def _results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


PARTS: Mapping[str, Callable[[], str]] = MappingProxyType(
    {
        "python -m benchmarks.projection": lambda: projection.table(WorkerModel(), ClientModel()),
        "python -m benchmarks.scaling": lambda: scaling.table(_results("scaling")),
        "python -m benchmarks.broker": lambda: broker.table(_results("broker")["cells"]),
        "python -m benchmarks.offload": lambda: offload.table(
            _results("offload")["shapes"] + _results("offload_head")["shapes"]
        ),
        "python -m benchmarks.asynchrony": lambda: asynchrony.table(_results("asynchrony")["runs"]),
        "python -m benchmarks.corrections": lambda: corrections.table(_results("corrections")["runs"]),
        "python -m benchmarks.lockstep": lambda: lockstep.table(_results("lockstep")),
    }
)


def rewritten(text: str) -> str:
    """`text` with every generated part as its figures are now. Raises `KeyError` for an unknown command."""

    def part(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- begin: {name} -->\n\n{PARTS[name]()}\n\n<!-- end -->"

    return _PART.sub(part, text)


def main() -> None:
    """Rewrites the documents and draws their pictures."""
    for document in DOCUMENTS:
        document.write_text(rewritten(document.read_text(encoding="utf-8")), encoding="utf-8")
        print(document)
    mpl.rcParams["svg.hashsalt"] = "hetrain"  # the same figures make the same file
    picture = DOCS / "figures" / "asynchrony.svg"
    plots.learning(_results("asynchrony")).savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
