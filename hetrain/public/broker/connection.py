"""The broker's address in the forms its clients want, a connection to it, and its errors in ours."""

from __future__ import annotations

import random
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic, sleep
from typing import TypeVar
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import redis
from redis import exceptions as foreign

from hetrain.public.errors import BrokerError, BrokerFull, BrokerUnreachable, UsageError

_SCHEMES = {"redis": "redis", "rediss": "rediss", "unix": "unix", "redis+socket": "unix"}
_FULL_HINT = "raise the broker's maxmemory, or lower `in_flight`"
_REACH_HINT = "check that the server runs and that the address and the password in the URL are right"
_CERTIFICATE_HINT = (
    "name the authority that signed the broker's certificate, ?ssl_ca_certs=/path/ca.crt in the URL, and the "
    "broker as the certificate names it"
)
_DENIED_HINT = (
    "a client may use only its tenant's keys: set HETRAIN_TENANT to the tenant of this user, and see "
    "docs/deployment.md for what else a user needs"
)
_TIMEOUT_S = 30.0
_CONNECT_TIMEOUT_S = 5.0

_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}

FULL_S = 20.0
"""How long writers wait for a full broker's memory, unless they are told otherwise."""

KEEPALIVE: dict[str, object] = {
    "socket_keepalive": True,
    "socket_keepalive_options": {
        getattr(socket, name): value for name, value in _KEEPALIVE.items() if hasattr(socket, name)
    },
}
"""Options of TCP connections: a peer that has silently gone is noticed after 30 s instead of 2 hours."""

T = TypeVar("T")


@dataclass(frozen=True)
class BrokerUrl:
    """A broker's address, parsed once. All parts but `path` keep their percent-encoding."""

    scheme: str
    credentials: str
    host: str
    socket: str
    database: int
    options: tuple[tuple[str, str], ...]

    def for_redis(self) -> str:
        """The form that redis-py wants: ``redis://``, ``rediss://`` or ``unix://``."""
        if self.socket:
            return self._join("unix", self.socket, {"db": str(self.database)})
        return self._join(self.scheme, f"/{self.database}", dict(self.options))

    def for_celery(self) -> str:
        """The form that kombu wants: ``redis://``, ``rediss://`` or ``redis+socket://``."""
        if self.socket:
            # Flower cannot parse the option, so it is left out where it says nothing.
            database = {"virtual_host": str(self.database)} if self.database else {}
            return self._join("redis+socket", self.socket, database)
        # Without this option kombu does not check the server's certificate.
        checked = {"ssl_cert_reqs": "required"} if self.scheme == "rediss" else {}
        return self._join(self.scheme, f"/{self.database}", checked | dict(self.options))

    def _join(self, scheme: str, path: str, query: dict[str, str]) -> str:
        login = f"{self.credentials}@" if self.credentials else ""
        tail = f"?{urlencode(query)}" if query else ""
        return f"{scheme}://{login}{self.host}{path}{tail}"


def redacted(url: str) -> str:
    """`url` without user, password and options, fit for a message. Never fails."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return "(not a URL)"
    return f"{scheme}://{re.split('[?#]', rest.rpartition('@')[2])[0]}"


def parse_broker_url(url: str) -> BrokerUrl:
    """Parses a ``redis://``, ``rediss://``, ``unix://`` or ``redis+socket://`` address.

    Options may be ``db`` (or ``virtual_host``), and ``ssl_*`` with ``rediss``.

    Raises:
        UsageError: another scheme, an unknown option, no socket path, a bad host, port or database.
    """
    try:
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        has_port = parts.port is None or parts.port > 0
    except ValueError:
        # The cause's message may repeat a part of the password.
        raise _bad_url(url, "cannot be parsed") from None
    scheme = _SCHEMES.get(parts.scheme)
    if scheme is None:
        raise _bad_url(url, "has an unknown scheme")
    credentials, _, host = parts.netloc.rpartition("@")
    database = query.pop("virtual_host", "") or "0"
    database = query.pop("db", "") or database
    if scheme == "unix":
        if host or not parts.path.strip("/"):
            raise _bad_url(url, "does not name a socket")
    else:
        if not parts.hostname or not has_port or not _is_host(parts.hostname):
            raise _bad_url(url, "has no valid host and port")
        database = parts.path.strip("/") or database
    if not (database.isascii() and database.isdecimal()):
        raise _bad_url(url, "has a database that is not a number")
    unknown = [name for name in query if scheme != "rediss" or not name.startswith("ssl_")]
    if unknown:
        raise _bad_url(url, "has options that are not understood")
    return BrokerUrl(
        scheme=scheme,
        credentials=credentials,
        host=host,
        socket=parts.path if scheme == "unix" else "",
        database=int(database),
        options=tuple(sorted(query.items())),
    )


def _is_host(host: str) -> bool:
    """Whether a name can be looked up: no label of it is empty or too long."""
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return True


def plaintext_warning(url: str) -> str | None:
    """What a user should know of an address that sends the password in clear over a network, if it does."""
    host = urlsplit(url).hostname
    if parse_broker_url(url).scheme != "redis" or host is None or _is_this_machine(host):
        return None
    return (
        f"redis:// sends the broker's password in clear to {host}, and anyone between can change what is "
        "sent: use rediss:// (docs/deployment.md)"
    )


def _is_this_machine(host: str) -> bool:
    """Whether all its addresses are this machine's own: only to those can a socket be bound."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
        for family, kind, _, _, address in found:
            with socket.socket(family, kind) as probe:
                probe.bind(address)
    except OSError:
        return False
    return True


def with_password(url: str, password: str) -> str:
    """`url` with a password, unless it has one."""
    if urlsplit(url).password:
        return url
    scheme, _, rest = url.partition("://")
    authority, slash, tail = rest.partition("/")
    user, at, host = authority.rpartition("@")
    name = user.partition(":")[0] if at else ""
    return f"{scheme}://{name}:{quote(password, safe='')}@{host}{slash}{tail}"


def _bad_url(url: str, what: str) -> UsageError:
    return UsageError(
        f"the broker's URL {what}",
        where=redacted(url),
        hint="write redis://:PASSWORD@HOST:PORT/0, rediss://... or unix://:PASSWORD@/PATH, "
        "and percent-encode special characters of the password",
    )


def connection_pool(url: str, *, max_connections: int = 256) -> redis.ConnectionPool:
    """Connections to the broker at `url`: RESP 2, bounded waits, no hidden retries."""
    address = parse_broker_url(url)
    return redis.ConnectionPool.from_url(
        address.for_redis(),
        protocol=2,
        socket_timeout=_TIMEOUT_S,
        socket_connect_timeout=_CONNECT_TIMEOUT_S,
        max_connections=max_connections,
        retry=None,
        **({} if address.socket else KEEPALIVE),
    )


def client(pool: redis.ConnectionPool) -> redis.Redis:
    """A client on `pool`, without retries of its own."""
    return redis.Redis(connection_pool=pool)


def ping(url: str) -> None:
    """Asks the broker for a sign of life, once.

    Raises:
        UsageError: the URL makes no sense.
        BrokerUnreachable: nobody answers, or the credentials are wrong.
    """
    pool = connection_pool(url, max_connections=1)
    try:
        with broker_errors(url):
            client(pool).ping()
    finally:
        pool.disconnect()


@contextmanager
def broker_errors(url: str) -> Iterator[None]:
    """Maps what redis-py and sockets raise to `BrokerError` and its subclasses; never shows a password."""
    where = redacted(url)
    try:
        yield
    except foreign.OutOfMemoryError as error:
        raise BrokerFull("the broker is out of memory", where=where, hint=_FULL_HINT) from error
    except foreign.NoPermissionError as error:
        raise BrokerError(
            f"the broker's access list forbids this ({error})", where=where, hint=_DENIED_HINT
        ) from error
    except (foreign.AuthenticationError, foreign.AuthorizationError) as error:
        raise BrokerUnreachable(
            "the broker refuses these credentials", where=where, hint="check user and password in the URL"
        ) from error
    except (foreign.ConnectionError, foreign.TimeoutError, OSError, EOFError) as error:
        hint = _CERTIFICATE_HINT if "CERTIFICATE_VERIFY_FAILED" in str(error) else _REACH_HINT
        raise BrokerUnreachable(
            f"the broker cannot be reached ({error or type(error).__name__})", where=where, hint=hint
        ) from error
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        # redis-py polls the socket, None by now, of a connection that another thread closes.
        if isinstance(error, TypeError) and "fileno" in str(error):
            raise BrokerUnreachable("the connection was closed", where=where) from error
        # It converts replies without looking at what they are.
        raise BrokerError(
            f"the broker sent a reply of another kind than asked for ({type(error).__name__}: {error})",
            where=where,
        ) from error
    except MemoryError as error:
        raise BrokerError("the broker's reply is longer than this machine's memory", where=where) from error
    except foreign.RedisError as error:
        if "OOM" in str(error):  # inside MULTI the refusal arrives as EXECABORT
            raise BrokerFull("the broker is out of memory", where=where, hint=_FULL_HINT) from error
        raise BrokerError(f"the broker refused a command ({error})", where=where) from error


def while_full(attempt: Callable[[], T], *, limit_s: float) -> T:
    """Calls `attempt` until it stops raising `BrokerFull`, with growing pauses, for about `limit_s` seconds.

    Raises:
        BrokerFull: the broker stayed full.
    """
    end = monotonic() + limit_s
    pause = 0.05
    while True:
        try:
            return attempt()
        except BrokerFull:
            left = end - monotonic()
            if left <= 0:
                raise
        # Spread out, so that several senders who wait for the same memory do not collide again.
        sleep(min(pause * random.uniform(0.5, 1.5), left))
        pause = min(pause * 2, 2.0)
