"""Which part of its models a worker serves."""

from __future__ import annotations

import os

from hetrain.public.errors import WorkerRefused
from hetrain.public.protocol.plan import Plan
from hetrain.public.protocol.registration import ShardRange


def served_shards() -> ShardRange | None:
    """The shards that ``$HETRAIN_SHARDS`` names, None for whole models. Raises `UsageError`."""
    text = os.environ.get("HETRAIN_SHARDS", "").strip()
    return ShardRange.parse(text) if text else None


def own_part(plan: Plan, shards: ShardRange | None) -> Plan:
    """The plan with those groups alone that lie in `shards`."""
    if shards is None:
        return plan
    n_groups = len(plan.groups)
    own = tuple(group for index, group in enumerate(plan.groups) if shards.has(index, n_groups))
    return plan.model_copy(update={"groups": own})


def refuse_others(plan: Plan, index: int, shards: ShardRange | None) -> None:
    """Raises `WorkerRefused` when group `index` of the plan does not lie in `shards`."""
    if shards is not None and not shards.has(index, len(plan.groups)):
        raise WorkerRefused(
            f"this worker serves shards {shards} of a model, and not this group",
            where=plan.groups[index].name,
            hint=f"its tasks belong into queue {shards.queue!r}; start workers for the other shards",
        )
