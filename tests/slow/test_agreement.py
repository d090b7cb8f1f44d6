"""Encrypted and plain training agree, on the real model over the real queue."""

from __future__ import annotations

import pytest

from benchmarks.convergence import Curve
from tests.harness.agreement import Agreement, train_all_ways


class TestSmolLM2(Agreement):
    @pytest.fixture(scope="class")
    def curves(self) -> dict[str, Curve]:
        return train_all_ways("smollm2-135m", 2048)
