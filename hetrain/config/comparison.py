"""What a job is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from hetrain.config.fields import require, require_least, setting
from hetrain.public.quantities import parse_bits_per_second

MEASURED = "measured"


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """What a job over a link is compared with: the same training on this machine.

    Raises:
        UsageError: a value makes no sense; `field` names it.
    """

    link: str | None = setting(
        None,
        "The link by which a job is compared with training on this machine, and groups are judged where "
        "`outsource` is auto. Bits per second each way between client and broker, as 100mbit or 2.5gbit; "
        "measured: send and fetch some MB over the broker of `workers`.",
        default="`hetrain plan` compares nothing; a job with auto measures it",
        metavar=f"RATE|{MEASURED}",
    )
    round_trip_ms: float | None = setting(
        None,
        "Milliseconds of a round trip between client and broker.",
        default=f"0, or what `link` {MEASURED} finds",
        least=0,
    )
    worker_speed: float = setting(
        990.0,
        "int8 operations per second of all workers together, in 10^12; a weight and a token take 12 in "
        "training. The default assumes one H100 at half of its data sheet; two cores with AVX-512 reach 1.7.",
    )
    egress_price: float = setting(
        # AWS, EC2 on demand, data transfer out to the Internet, first 10 TB a month, us-east-1:
        # https://aws.amazon.com/ec2/pricing/on-demand/
        0.09,
        "USD for a GB that leaves the workers' side for the client. The default is a list price of AWS.",
        least=0,
    )
    client_memory: int | None = setting(
        None,
        "Memory that the client, or local training, may take, e.g. 8GB.",
        default="what this machine has free",
        metavar="SIZE",
        least=1,
    )
    probe: bool | None = setting(
        None,
        "Measure this machine for about 20 seconds: a block of the model trained locally, the client's own "
        "layers, and its encryption. Without, nothing is said about times on this machine.",
        default="with `link`",
    )

    @property
    def bits_per_s(self) -> float | None:
        """The rate that `link` gives; None where there is none or it is to be measured."""
        if self.link is None or self.link == MEASURED:
            return None
        return parse_bits_per_second(self.link, field="link")

    @property
    def probes(self) -> bool:
        """Whether to measure this machine."""
        return self.link is not None if self.probe is None else self.probe

    def __post_init__(self) -> None:
        require_least(self)
        _ = self.bits_per_s
        require(self.worker_speed > 0, "worker_speed", f"{self.worker_speed} is not positive")
        needs_link = bool(self.probe) and self.link is None
        require(not needs_link, "probe", "there is nothing to compare with", "give `link` too")
