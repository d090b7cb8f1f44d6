"""Writes figures into the documentation: ``python -m benchmarks.update_docs``.

A generated part of docs/scaling.md stands between ``<!-- begin: COMMAND -->`` and ``<!-- end -->``, where the
command is what makes its figures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from benchmarks import projection, scaling
from benchmarks.hardware import ClientModel, WorkerModel
from benchmarks.report import RESULTS

DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"
_PART = re.compile(r"<!-- begin: (?P<name>.+?) -->\n.*?<!-- end -->", re.DOTALL)


def _scaling() -> str:
    return scaling.table(json.loads((RESULTS / "scaling.json").read_text(encoding="utf-8")))


PARTS: Mapping[str, Callable[[], str]] = MappingProxyType(
    {
        "python -m benchmarks.projection": lambda: projection.table(WorkerModel(), ClientModel()),
        "python -m benchmarks.scaling --asynchronous --json benchmarks/results/scaling.json": _scaling,
    }
)


def rewritten(text: str) -> str:
    """`text` with every generated part as its figures are now. Raises `KeyError` for an unknown command."""

    def part(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- begin: {name} -->\n\n{PARTS[name]()}\n\n<!-- end -->"

    return _PART.sub(part, text)


def main() -> None:
    """Rewrites the document."""
    DOCUMENT.write_text(rewritten(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    print(DOCUMENT)


if __name__ == "__main__":
    main()
