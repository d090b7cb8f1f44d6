"""The table of targets."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tests.fuzz.client_targets import CLIENT_TARGETS
from tests.fuzz.file_targets import FILE_TARGETS
from tests.fuzz.run import Target
from tests.fuzz.worker_targets import WORKER_TARGETS

TARGETS: Mapping[str, Target] = MappingProxyType(
    {target.name: target for target in (*WORKER_TARGETS, *CLIENT_TARGETS, *FILE_TARGETS)}
)
