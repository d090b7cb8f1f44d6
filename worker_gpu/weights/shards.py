"""Which part of its models a worker serves."""

from __future__ import annotations

from hetrain.public.errors import WorkerRefused
from hetrain.public.protocol.plan import Plan
from hetrain.public.protocol.registration import ShardRange


def own_part(plan: Plan, shards: ShardRange | None) -> Plan:
    """The plan, reduced to the groups in `shards`."""
    if shards is None:
        return plan
    n_groups = len(plan.groups)
    own = tuple(group for index, group in enumerate(plan.groups) if shards.has(index, n_groups))
    return plan.model_copy(update={"groups": own})


def require_own_group(plan: Plan, index: int, shards: ShardRange | None) -> None:
    """Raises `WorkerRefused` when group `index` of the plan does not lie in `shards`."""
    if shards is not None and not shards.has(index, len(plan.groups)):
        raise WorkerRefused(
            f"this worker serves only shards {shards} of a model, and this group is in another one",
            where=plan.groups[index].name,
            hint=f"its own tasks go to queue {shards.queue!r}; start workers for the other shards",
        )
