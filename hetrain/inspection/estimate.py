"""What a job costs over a link and on this machine, on paper: figures in, figures out.

Every stage of a job has one resource, and takes as long as its total:

    up        8·bytes_up·tokens / link          down      8·bytes_down·tokens / link   (full duplex)
    client    client_s·tokens / cores           workers   12·weights·tokens / operations per second
    waiting   2·round trip·products·micro-batches, which no resource is busy with

With r micro-batches at once stages overlap, and the job takes

    max(up, down, client, workers, (up + down + client + workers + waiting) / r)

which is the bound of a closed queueing network: no job is faster, and one without stragglers comes near. The
same tokens trained locally take local_s·tokens / cores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum

from hetrain.public.errors import UsageError
from hetrain.public.quantities import say_bits_per_second, say_bytes, say_seconds

OPERATIONS = 12
"""Integer operations of a worker for a weight and a token: 3 int8 products, 2 each, forward and backward."""
_ROUND_TRIPS = 2
"""Of the client for a product: the operand with its task, and the result after its report."""


@dataclass(frozen=True)
class Work:
    """What a job asks for.

    Attributes:
        tokens: of all its updates.
        bytes_up: sent by the client for a token, both passes.
        bytes_down: received for a token.
        weights: numbers in outsourced matrices.
        products: products of one micro-batch, one after the other.
        micro_batches: of the whole job.
        at_once: of them that overlap.
    """

    tokens: int
    bytes_up: float
    bytes_down: float
    weights: int
    products: int = 0
    micro_batches: float = 0.0
    at_once: int = 2


@dataclass(frozen=True)
class Link:
    """The client's way to the broker: bits per second each way, and the seconds of a round trip."""

    bits_per_s: float
    round_trip_s: float = 0.0


@dataclass(frozen=True)
class MachineCosts:
    """Processor seconds of a token of the job on this machine, as client and trained locally; its cores."""

    client_s: float
    local_s: float
    cores: int


@dataclass(frozen=True)
class Memory:
    """Bytes that the client and local training take, and that this machine has for either."""

    client: float
    local: float
    limit: float


@dataclass(frozen=True)
class Rates:
    """What is assumed: int8 operations per second of all workers together, and USD per GB of egress."""

    operations_per_s: float
    egress_price: float


class Verdict(Enum):
    """What to do."""

    OUTSOURCE = "outsource"
    OUTSOURCE_FOR_MEMORY = "outsource for memory"
    TRAIN_LOCALLY = "train locally"
    NO_MEMORY = "no memory"
    NOTHING_TO_DO = "nothing to do"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Estimate:
    """A job in seconds, bytes and USD; None where this machine was not measured.

    Attributes:
        up_s, down_s: the link is busy that long, each way.
        client_s: so are the client's cores.
        worker_s: so are the workers.
        waiting_s: round trips.
        job_s: the job. Without `client_s` no job is faster.
        bottleneck: the stage that decides: up, down, client, workers, or overlap where more micro-batches at
            once would help.
        local_s: the same tokens, trained locally.
        egress_bytes: what leaves the workers' side for the client, and is charged there.
        egress_usd: its price.
        break_even_bits: the link at which the job takes as long as local training; None: at none, or unknown.
        verdict: what to do.
        sentence: the same in words.
    """

    up_s: float
    down_s: float
    client_s: float | None
    worker_s: float
    waiting_s: float
    job_s: float
    bottleneck: str
    local_s: float | None
    egress_bytes: float
    egress_usd: float
    break_even_bits: float | None
    verdict: Verdict
    sentence: str


def estimate(
    work: Work, link: Link, rates: Rates, costs: MachineCosts | None = None, memory: Memory | None = None
) -> Estimate:
    """See the module.

    Raises:
        UsageError: a figure that time is divided by is not positive, or another one negative.
    """
    _require(work, link, rates, costs)
    client = None if costs is None else costs.client_s * work.tokens / costs.cores
    local = None if costs is None else costs.local_s * work.tokens / costs.cores
    stages = {
        "up": 8 * work.bytes_up * work.tokens / link.bits_per_s,
        "down": 8 * work.bytes_down * work.tokens / link.bits_per_s,
        "client": client or 0.0,
        "workers": OPERATIONS * work.weights * work.tokens / rates.operations_per_s,
    }
    waiting = _ROUND_TRIPS * link.round_trip_s * work.products * work.micro_batches
    limits = stages | {"overlap": (sum(stages.values()) + waiting) / work.at_once}
    bottleneck = max(limits, key=lambda name: limits[name])
    job, egress = limits[bottleneck], work.bytes_down * work.tokens
    even = None
    if local is not None:
        even = _break_even(work, stages["client"], stages["workers"], waiting, local)
    verdict = _verdict(work, job, local, memory)
    found = Estimate(
        up_s=stages["up"],
        down_s=stages["down"],
        client_s=client,
        worker_s=stages["workers"],
        waiting_s=waiting,
        job_s=job,
        bottleneck=bottleneck,
        local_s=local,
        egress_bytes=egress,
        egress_usd=egress / 1e9 * rates.egress_price,
        break_even_bits=even,
        verdict=verdict,
        sentence="",
    )
    return replace(found, sentence=_sentence(verdict, found, memory))


def _require(work: Work, link: Link, rates: Rates, costs: MachineCosts | None) -> None:
    for name, value in (
        ("link", link.bits_per_s),
        ("worker_speed", rates.operations_per_s),
        ("in_flight", work.at_once),
        ("cores", math.inf if costs is None else costs.cores),
    ):
        if not value > 0:
            raise UsageError(f"{value} is not positive", field=name, hint="give a value above 0")
    for name, value in (
        ("tokens", work.tokens),
        ("round_trip_ms", link.round_trip_s),
        ("egress_price", rates.egress_price),
    ):
        if not 0 <= value < math.inf:
            raise UsageError(f"{value} is negative or endless", field=name, hint="give 0 or more")


def _break_even(
    work: Work, client_s: float, worker_s: float, waiting_s: float, local_s: float
) -> float | None:
    """The smallest x with max(up, down)/x ≤ local and (up + down)/x + client + workers + waiting ≤ r·local.

    None where client or workers alone, or all but the link together, take longer; 0 where no byte travels.
    """
    up, down = 8 * work.bytes_up * work.tokens, 8 * work.bytes_down * work.tokens
    spare = work.at_once * local_s - client_s - worker_s - waiting_s
    if work.tokens == 0 or max(client_s, worker_s) > local_s or spare <= 0:
        return None
    return max(max(up, down) / local_s, (up + down) / spare)


def _verdict(work: Work, job_s: float, local_s: float | None, memory: Memory | None) -> Verdict:
    if work.tokens == 0:
        return Verdict.NOTHING_TO_DO
    if local_s is None:
        return Verdict.UNDECIDED
    fits_client = memory is None or memory.client <= memory.limit
    fits_locally = memory is None or memory.local <= memory.limit
    if not fits_locally:
        return Verdict.OUTSOURCE_FOR_MEMORY if fits_client else Verdict.NO_MEMORY
    return Verdict.OUTSOURCE if fits_client and job_s < local_s else Verdict.TRAIN_LOCALLY


def _sentence(verdict: Verdict, found: Estimate, memory: Memory | None) -> str:
    job = say_seconds(found.job_s)
    if verdict is Verdict.NOTHING_TO_DO:
        return "There is nothing to train: the data set has no tokens."
    if found.local_s is None:
        return (
            f"The link and the workers alone take {job}. Whether that pays is open, since this machine was "
            "not measured."
        )
    if memory is not None and not memory.client <= memory.limit >= memory.local:
        return _of_memory(verdict, found, memory)
    took = f"the job takes about {job} over this link, and training takes {say_seconds(found.local_s)} here"
    if verdict is Verdict.OUTSOURCE:
        return f"Outsource: {took}. {_pays_from(found)}"
    return f"Train locally, outsourcing does not pay here: {took}. {_pays_from(found)}"


def _of_memory(verdict: Verdict, found: Estimate, memory: Memory) -> str:
    client, local, limit = map(say_bytes, (memory.client, memory.local, memory.limit))
    if verdict is Verdict.TRAIN_LOCALLY:
        return (
            f"Train locally: the client would take about {client} of memory, and {limit} are there; lower "
            "`in_flight` or `micro_batch_tokens`, or outsource more, if you have to outsource."
        )
    if verdict is Verdict.OUTSOURCE_FOR_MEMORY:
        return (
            f"Outsource: training here would take about {local} of memory, and {limit} are there; the client "
            f"takes {client}, and the job about {say_seconds(found.job_s)}."
        )
    return (
        f"Neither fits: training here would take about {local} of memory, the client {client}, and {limit} "
        "are there; lower `micro_batch_tokens`, or outsource more if linears stay."
    )


def _pays_from(found: Estimate) -> str:
    assert found.local_s is not None
    assert found.client_s is not None
    if found.break_even_bits is not None:
        return f"It pays from {say_bits_per_second(found.break_even_bits)} each way."
    if found.client_s > found.local_s:
        return f"No link changes that: the client's own part takes {say_seconds(found.client_s)}."
    if found.worker_s > found.local_s:
        return (
            f"No link changes that: the workers take {say_seconds(found.worker_s)}; give them `worker_speed`."
        )
    return "No rate changes that: computing and round trips take longer; raise `in_flight`."
