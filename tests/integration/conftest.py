"""What tests of the queue share: a model of one matrix, and products with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hetrain.public.protocol.plan import Plan
from tests.harness.in_flight import InFlight
from tests.harness.one_matrix import Send, matrix_of, plan_of, save_model, sender


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def matrix(model: Path) -> np.ndarray:
    return matrix_of(model)


@pytest.fixture(scope="module")
def plan(matrix: np.ndarray) -> Plan:
    return plan_of(matrix)


@pytest.fixture
def in_flight(monkeypatch: pytest.MonkeyPatch) -> InFlight:
    return InFlight(monkeypatch)


@pytest.fixture
def send(in_flight: InFlight, plan: Plan) -> Send:
    return sender(in_flight, plan)
