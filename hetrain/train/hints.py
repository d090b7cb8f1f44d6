"""What a job prepares with its workers before the first operand leaves: the hints that it lacks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch

from hetrain.public.protocol.plan import Plan
from hetrain.public.protocol.product import Product
from hetrain.secret.engines.rlwe.hints import HintClaim, HintStore, hint_operand
from hetrain.secret.verification.parts import PartsCheck, Weights
from hetrain.secret.verification.rows import FieldRows
from hetrain.transport.channel import Channel

OnPrepare = Callable[[int, int], object]
"""Called with the number of hints that are made, and of all that had to be."""
_AT_ONCE = 2

_log = logging.getLogger(__name__)


def ignore_progress(done: int, total: int) -> None:
    """An `OnPrepare` that does nothing."""


def make_hints(
    store: HintStore, plan: Plan, channel: Channel, weights: Weights, on_prepare: OnPrepare
) -> None:
    """Has workers compute the hints of `plan` that `store` lacks; each is verified exactly before it is kept.

    Args:
        store: the client's hints.
        plan: the job's products, to which the workers have agreed.
        channel: the way to them.
        weights: loads the matrix of a product.
        on_prepare: hears of the progress.

    Raises:
        StorageError: the disk has no room.
        UsageError: the cache cannot be written.
        WorkerError: as `Channel.multiply`.
    """
    if not store.missing(plan):
        return
    with store.locked(plan, lambda: _log.info("another job makes the hints of this model: waiting for it")):
        missing = store.missing(plan)
        store.require_room(missing)
        _make(store, missing, channel, weights, on_prepare)


def _make(
    store: HintStore,
    missing: Sequence[Product],
    channel: Channel,
    weights: Weights,
    on_prepare: OnPrepare,
) -> None:
    def one(product: Product) -> None:
        seed = store.hint(product).seed
        check: PartsCheck[FieldRows, torch.Tensor] = PartsCheck(
            product, HintClaim(product, seed, weights), weights
        )
        channel.multiply(product, hint_operand(product, seed), check.add)
        store.keep(product, [each.values for each in check.results()])

    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="hints") as pool:
        on_prepare(0, len(missing))
        futures = [pool.submit(one, product) for product in missing]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                on_prepare(done, len(missing))
        except BaseException:
            for future in futures:
                future.cancel()
            raise
