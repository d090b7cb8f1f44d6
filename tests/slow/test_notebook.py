"""The notebook in examples/ runs, and its committed outputs are those of a whole run."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "private_finetuning.ipynb"


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def losses(notebook: nbformat.NotebookNode) -> list[float]:
    """The losses that the last cell prints: before training, and after."""
    (printed,) = notebook.cells[-1].outputs
    return [float(line.split("loss ")[1].split()[0]) for line in printed.text.splitlines()]


def test_the_notebook_runs_and_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HETRAIN_BROKER_URL", raising=False)
    committed = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    fresh = nbformat.from_dict(committed)
    NotebookClient(
        fresh, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    for notebook in (committed, fresh):
        nbformat.validate(notebook)
        assert not any(output.output_type == "error" for output in outputs(notebook))
        assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
        before, after = losses(notebook)
        assert after < before / 2
