"""Encrypted and plain training agree, on a tiny model over the real queue (tests/slow: on the real model)."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.convergence import Curve
from tests.harness.agreement import Agreement, train_all_ways


class TestTinyModel(Agreement):
    @pytest.fixture(scope="class")
    def curves(self, tiny_llama: Path) -> dict[str, Curve]:
        return train_all_ways(str(tiny_llama), 512)
