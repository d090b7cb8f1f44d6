"""A run's records are read back, whatever a full disk or a killed process has left of them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from hetrain.jobs.files import JOB_FILE, METRICS_FILE
from hetrain.train.records import EVALUATIONS_FILE, add_evaluation, last_evaluated, read_run
from tests.harness.small_disk import small_disk

HALF = b'{"step": 2, "dataset": ["a\xc3'


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A data set."""
    path = tmp_path / "rows.jsonl"
    path.touch()
    return path


def test_half_a_line_spoils_no_other(tmp_path: Path, rows: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / JOB_FILE).write_text('{"steps": 3}')
    for name in (METRICS_FILE, EVALUATIONS_FILE):
        (tmp_path / name).write_bytes(b'{"step": 1}\n' + HALF)
    add_evaluation(tmp_path, [str(rows)], {"loss": 1.0})
    add_evaluation(tmp_path, ["validation split"], {"loss": 2.0})
    run = read_run(tmp_path)
    assert [record["step"] for record in run.micro_batches] == [1]
    assert [record.get("loss") for record in run.evaluations] == [None, 1.0, 2.0]
    assert last_evaluated(tmp_path) == (rows, {})
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_an_evaluation_without_room_leaves_no_part(tmp_path: Path, rows: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        (disk.path / JOB_FILE).write_text("{}")
        add_evaluation(disk.path, [str(rows)], {"loss": 1.0})
        before = (disk.path / EVALUATIONS_FILE).read_bytes()
        disk.fill(leave=4096)
        add_evaluation(disk.path, [str(rows)], {"long": "x" * 10_000})
        assert (disk.path / EVALUATIONS_FILE).read_bytes() == before
        disk.free()
        add_evaluation(disk.path, [str(rows)], {"loss": 2.0})
        assert [record["loss"] for record in read_run(disk.path).evaluations] == [1.0, 2.0]
