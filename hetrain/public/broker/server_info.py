"""What a broker reports about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter

from redis.exceptions import NoPermissionError

from hetrain.public.broker import connection as broker
from hetrain.public.protocol.messages import printable

_VERSIONS = ("valkey_version", "redis_version")


@dataclass(frozen=True)
class BrokerReport:
    """What a broker reports about itself; None where it does not.

    Attributes:
        where: its address, without credentials.
        server: name and version.
        maxmemory: bytes it may hold, 0 without a limit.
        policy: what it does when it is full.
        used: bytes it holds.
        round_trip_ms: median of a few pings, or the time of the one request that was sent.
    """

    where: str
    server: str | None
    maxmemory: int | None
    policy: str | None
    used: int | None
    round_trip_ms: float


def ask_broker(url: str, *, pings: int = 0) -> BrokerReport:
    """Asks the broker at `url` about itself, with one request and `pings` more.

    Raises:
        UsageError: the URL makes no sense.
        BrokerError: the broker cannot be reached or refuses the credentials.
    """
    pool = broker.connection_pool(url, max_connections=1)
    client = broker.client(pool)
    times = []
    try:
        with broker.broker_errors(url):
            try:
                begin = perf_counter()
                info = client.info()
            except NoPermissionError:  # a job needs no INFO
                info = {}
            times.append(perf_counter() - begin)
            for _ in range(pings):
                begin = perf_counter()
                client.ping()
                times.append(perf_counter() - begin)
    finally:
        pool.disconnect()
    return BrokerReport(
        where=broker.redacted(url),
        server=_server(info),
        maxmemory=_number(info.get("maxmemory")),
        policy=None if "maxmemory_policy" not in info else printable(info["maxmemory_policy"]),
        used=_number(info.get("used_memory")),
        round_trip_ms=1000 * median(times),
    )


def _server(info: Mapping[str, object]) -> str | None:
    for key in _VERSIONS:
        if key in info:
            return f"{key.partition('_')[0]} {printable(info[key])}"
    return None


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None
