"""What the rest of the client sees of the workers: a channel that takes requests and gives replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from hetrain.public.protocol.messages import Completion, Direction, Header

NO_HEADER: Header = MappingProxyType({})
RowRange = tuple[int, int]


@dataclass(frozen=True)
class Reply:
    """The answer to one `Channel.send`.

    Attributes:
        parts: the result's bytes, one part per row range, in the order asked for.
        bytes_up: bytes of the payload, which is uploaded once for all row ranges.
        bytes_down: bytes of all parts.
        server_s: seconds of computing, added over the row ranges.
        device: the devices that computed.
    """

    parts: list[memoryview]
    bytes_up: int
    bytes_down: int
    server_s: float
    device: str


class Pending(Protocol):
    """A request on its way."""

    def result(self) -> Reply:
        """Waits for the workers, downloads and removes the result. May be called once.

        Raises:
            WorkerError: no worker answers, one refuses, or the task fails; as the worker reports it.
            BrokerError: the broker failed for longer than the channel is patient.
            WireError: a result is not what was asked for.
            Interrupted: the channel was closed meanwhile.
        """
        ...


class Channel(Protocol):
    """The way to the workers, for one job. Thread-safe."""

    def prepare(
        self, model: str, engine: str, plan: bytes, plan_digest: str, setup: Header = NO_HEADER
    ) -> Completion:
        """Publishes the job's plan and waits until a worker has loaded what it names.

        Args:
            model: the model's name, as workers know it.
            engine: the engine's name.
            plan: canonical bytes of the plan.
            plan_digest: SHA-256 of `plan`, in hexadecimal.
            setup: the engine's public part of the message.

        Raises: as `Pending.result`, above all `WorkerRefused` and `NoWorker`.
        """
        ...

    def partition(self, group: str, n_rows: int, nbytes: int, step: int) -> list[RowRange]:
        """Ranges that partition the ``0:n_rows`` rows of a product: what to ask `send` for.

        Args:
            group: the group's name in the plan.
            n_rows: rows of the product.
            nbytes: bytes of the operand.
            step: rows that the engine evaluates together.
        """
        ...

    def send(
        self,
        group: str,
        direction: Direction,
        header: Header,
        payload: Sequence[memoryview],
        rows: Sequence[RowRange],
    ) -> Pending:
        """Uploads `payload` once and asks for its product with every range of rows.

        Args:
            group: the group's name in the plan.
            direction: which of the group's two products.
            header: the engine's public part of the message.
            payload: the operand, as parts that travel one after the other. They must not change until the
                reply is there, since a lost request is sent again from them.
            rows: ``(start, stop)`` of every task; each may go to another worker.

        Raises:
            BrokerError: the broker is full or unreachable.
        """
        ...

    def close(self) -> None:
        """Gives up what is pending and removes the job's keys from the broker. Can be called again."""
        ...
