"""Workers are killed at random moments, ten times, and training does not notice; `tests/slow` kills fifty."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.faults import check_that_kills_change_nothing


@pytest.mark.usefixtures("one_thread")
def test_ten_kills_change_neither_the_updates_nor_a_bit(tiny_llama: Path, tmp_path: Path) -> None:
    check_that_kills_change_nothing(10, tiny_llama, tmp_path)
