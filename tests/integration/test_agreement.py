"""Encrypted and plain training agree, on the real model over the real queue (2048 tokens: tests/slow)."""

from __future__ import annotations

import pytest

from benchmarks.convergence import Curve
from tests.harness.agreement import Agreement, train_all_ways


class TestMicroBatchOf512Tokens(Agreement):
    @pytest.fixture(scope="class")
    def curves(self) -> dict[str, Curve]:
        return train_all_ways(512)
