"""Whether a job keeps hints, and where."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping

from hetrain.public.errors import UsageError
from hetrain.public.model.files import cache_directory
from hetrain.public.protocol.plan import Plan
from hetrain.public.protocol.product import ProductKey
from hetrain.secret.engine import ClientEngine
from hetrain.secret.engines.rlwe.hints import HintStore, hint_bytes
from hetrain.secret.verification import Sketch

_MICRO_BATCHES_THAT_PAY = 4
_SPARE_BYTES = 1 << 30

_log = logging.getLogger(__name__)


def wants_hints(engine: ClientEngine, asked: bool | None, micro_batches: int) -> bool:
    """Whether a job should keep hints, if there is room for them.

    Args:
        engine: the job's engine.
        asked: what the user said, None for nothing.
        micro_batches: how many the job will make: the first ones only fill the store.

    Raises:
        UsageError: the user asked for hints of an engine that has none.
    """
    if asked and not engine.has_hints:
        raise UsageError(f"engine {engine.name!r} has no hints", where="--hints", hint="use --engine rlwe")
    if asked is None:
        return engine.has_hints and micro_batches >= _MICRO_BATCHES_THAT_PAY
    return asked


def open_hints(plan: Plan, sketches: Mapping[ProductKey, Sketch], *, required: bool) -> HintStore | None:
    """The job's store; None when the disk has no room for it and it is not `required`.

    Raises:
        UsageError: there is no room, and it is required.
    """
    directory, needed = cache_directory(), hint_bytes(plan)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
        if free < needed + _SPARE_BYTES:
            raise OSError(f"only {free / 1e9:.1f} GB are free")
        return HintStore(plan, sketches, directory)
    except OSError as error:
        text = f"hints take {needed / 1e9:.1f} GB of disk: {error}"
        if required:
            raise UsageError(
                text, where=str(directory), hint="make room, set HETRAIN_CACHE, or use --no-hints"
            ) from error
        _log.warning("%s: %s; going on without them", directory, text)
        return None
