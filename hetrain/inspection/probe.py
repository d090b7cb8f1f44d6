"""Queries the workers behind a broker for their reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic, sleep

from celery import Celery
from kombu import Connection
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from hetrain.public.broker import connection as broker
from hetrain.public.errors import HetrainError, WireError
from hetrain.public.protocol.messages import CONTROL_REPORT, WorkerReport, parse, printable

_QUIET_S = 2.0
_POLL_S = 1.0
_LONGEST_ROUND_S = 10.0
_MAX_REPLIES = 1000


@dataclass(frozen=True)
class ProbeResult:
    """Workers that have answered, by name, and why other answers were refused."""

    workers: tuple[WorkerReport, ...]
    refused: tuple[WireError, ...]


def probe_workers(
    url: str,
    *,
    first_s: float,
    settle_s: float,
    expected: int | None = None,
    health_check: Callable[[], HetrainError | None] = lambda: None,
) -> ProbeResult:
    """Asks all workers on the broker at `url` for their reports, repeatedly until one answers.

    With an unknown number of workers a round ends two seconds after the last answer.

    Args:
        url: the broker's address.
        first_s: seconds to wait for a first answer, roughly.
        settle_s: seconds to wait then for workers that are still opening an engine.
        expected: number of workers; None when it is unknown.
        health_check: the failure of processes on which workers depend, if any (see `Embedded.failure`).

    Returns:
        Without workers when none answers.

    Raises:
        UsageError: the URL makes no sense.
        BrokerError: the broker cannot be reached, or is full.
        HetrainError: whatever `health_check` reports.
    """
    answers = _Answers()
    begin = monotonic()
    while True:
        if (failure := health_check()) is not None:
            raise failure
        _ask(url, answers, expected)
        end = begin + first_s + (settle_s if answers.workers else 0.0)
        if answers.are_settled or monotonic() > end:
            break
    return ProbeResult(
        tuple(answers.workers[key] for key in sorted(answers.workers)), tuple(answers.refused.values())
    )


class _EndOfRound(Exception):
    """Ends a round that would last for as long as answers arrive."""


@dataclass
class _Answers:
    """The latest answer of each worker. Each is hostile until parsed."""

    workers: dict[tuple[str, str], WorkerReport] = field(default_factory=dict)
    refused: dict[str, WireError] = field(default_factory=dict)
    count: int = 0
    until: float = 0.0

    @property
    def are_settled(self) -> bool:
        """Whether a worker has answered, and none is still opening an engine."""
        opening = any(
            engine.state == "opening" for worker in self.workers.values() for engine in worker.engines
        )
        return bool(self.workers) and not opening

    def take(self, body: object) -> None:
        """Takes one reply: ``{name: report}``."""
        self.count += 1
        if self.count > _MAX_REPLIES:
            raise _EndOfRound
        for name, reply in body.items() if isinstance(body, dict) else [("?", body)]:
            where = f"worker {printable(name)}"
            try:
                report = parse(WorkerReport, _as_json(reply, where), where=where)
            except WireError as error:
                self.refuse(error)
            else:
                self.workers[report.worker, report.hostname] = report
        if monotonic() > self.until:
            raise _EndOfRound

    def refuse(self, error: WireError) -> None:
        """Records an answer that cannot be read."""
        self.refused[str(error)] = error


def _as_json(reply: object, where: str) -> str:
    try:
        return json.dumps(reply)
    except (TypeError, ValueError, RecursionError) as error:  # kombu makes objects of some JSON
        raise WireError(f"the reply is no JSON ({type(error).__name__})", where=where) from error


def _ask(url: str, answers: _Answers, expected: int | None) -> None:
    """One round: asks all, and listens until no answer has come for a while."""
    answers.until = monotonic() + _LONGEST_ROUND_S
    app = _app(url)
    try:
        with broker.broker_errors(url), app.connection_for_write() as connection:
            _broadcast(app, connection, answers, expected)
    except _EndOfRound:
        pass
    except WireError as error:
        answers.refuse(error)
        sleep(_POLL_S)  # the next round may begin with the same
    finally:
        app.close()


def _broadcast(app: Celery, connection: Connection, answers: _Answers, expected: int | None) -> None:
    try:
        app.control.broadcast(
            CONTROL_REPORT,
            reply=True,
            timeout=_QUIET_S if expected is None else _POLL_S,
            limit=expected,
            callback=answers.take,
            connection=connection,
        )
    except (_EndOfRound, RedisError, OSError, EOFError):
        raise
    except OperationalError as error:
        cause = error.__cause__
        raise (cause if isinstance(cause, RedisError | OSError) else OSError(str(error))) from error
    except Exception as error:  # kombu's errors for bytes that are none of its messages
        raise WireError(
            f"a reply is no message ({type(error).__name__}); others may have been lost with it",
            where="workers' replies",
            hint="check who else can write to the broker",
        ) from error


def _app(url: str) -> Celery:
    address = broker.parse_broker_url(url).for_celery()
    app = Celery("hetrain-probe", set_as_current=False)
    app.conf.update(
        # Both: CELERY_BROKER_URL in the environment would replace broker_url.
        broker_read_url=address,
        broker_write_url=address,
        broker_transport_options={"socket_timeout": 30, "socket_connect_timeout": 5, "ack_emulation": False},
        accept_content=["json"],
        task_serializer="json",
    )
    return app
