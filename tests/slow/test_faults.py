"""Workers are killed at random moments, fifty times, and training does not notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.faults import check_that_kills_change_nothing


@pytest.mark.usefixtures("one_thread")
def test_fifty_kills_change_neither_the_updates_nor_a_bit(tiny_llama: Path, tmp_path: Path) -> None:
    check_that_kills_change_nothing(50, tiny_llama, tmp_path)
