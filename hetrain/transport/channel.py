"""What the rest of the client sees of the workers: a channel that multiplies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from hetrain.public.protocol.messages import Completion, Header
from hetrain.public.protocol.product import Operand, Part, Product

NO_HEADER: Header = MappingProxyType({})

Accept = Callable[[Part], None]
"""Checks one part of a result; raises `ResultRejected` to have parts computed by other workers.

Nothing is accepted any more from the error's `workers`, which have computed this part or earlier ones of the
product: their parts of it are computed anew.
"""


def accept_any(part: Part) -> None:
    """Checks nothing."""


@dataclass(frozen=True)
class Reply:
    """The result of one product.

    Attributes:
        parts: ranges that partition the rows of W, in order.
        bytes_up: bytes of the operand, which is uploaded once for all ranges.
    """

    parts: tuple[Part, ...]
    bytes_up: int

    @property
    def bytes_down(self) -> int:
        """Bytes of all parts."""
        return sum(part.data.nbytes for part in self.parts)

    @property
    def server_s(self) -> float:
        """Seconds of computing, added over the parts."""
        return sum(part.seconds for part in self.parts)

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that computed, sorted."""
        return tuple(sorted({part.device for part in self.parts}))


class Channel(Protocol):
    """The way to the workers, for one job. Thread-safe."""

    def prepare(
        self, model: str, engine: str, plan: bytes, plan_digest: str, setup: Header = NO_HEADER
    ) -> Completion:
        """Publishes the job's plan and waits until workers have loaded what it names.

        Args:
            model: the model's name, as workers know it.
            engine: the engine's name.
            plan: canonical bytes of the plan.
            plan_digest: SHA-256 of `plan`, in hexadecimal.
            setup: the engine's public part of the message.

        Raises: as `multiply`, above all `WorkerRefused` and `NoWorker`.
        """
        ...

    def multiply(self, product: Product, operand: Operand, accept: Accept = accept_any) -> Reply:
        """Uploads `operand` and waits for its product with W, which several workers may share.

        Args:
            product: which one.
            operand: X, sealed.
            accept: checks every part as it arrives, in the calling thread.

        Raises:
            WorkerError: no worker answers, one refuses, or the task fails; as the worker reports it.
            ResultRejected: `accept` refused a part, and no other worker could compute it.
            BrokerError: the broker is full or unreachable for longer than the channel waits.
            WireError: a result is not what was asked for.
            Interrupted: the channel was closed meanwhile.
        """
        ...

    def close(self) -> None:
        """Gives up what is pending and removes the job's keys from the broker. Can be called again."""
        ...
