"""A job over a link beside training on this machine, as `hetrain plan` shows it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from enum import Enum

from rich.console import Console
from rich.table import Table

from cli.options import as_options
from hetrain import api
from hetrain.public.quantities import say_bits_per_second, say_bytes, say_seconds

_LIMITS = {
    "up": "what goes up the link",
    "down": "what comes down the link",
    "client": "this machine as the client",
    "workers": "the workers",
    "overlap": "how few micro-batches are under way at once",
}


def as_json(found: api.Comparison) -> dict[str, object]:
    """All figures: seconds, bytes, bits per second, USD."""
    return asdict(found, dict_factory=_plain)


def print_comparison(console: Console, found: api.Comparison, hint_bytes: int) -> None:
    """A table, and what to do in a sentence."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for heading, text in _rows(found, hint_bytes):
        table.add_row(heading, text)
    console.print(table, highlight=False)
    if found.note:
        console.print(f"This machine was not measured: {as_options(found.note)}", highlight=False)
    console.print(as_options(found.estimate.sentence), style="bold", highlight=False)


def _plain(pairs: list[tuple[str, object]]) -> dict[str, object]:
    return {name: value.value if isinstance(value, Enum) else value for name, value in pairs}


def _rows(found: api.Comparison, hint_bytes: int) -> Iterator[tuple[str, str]]:
    each, rates, costs, memory = found.estimate, found.rates, found.costs, found.memory
    origin = "measured" if found.link_measured else "given"
    yield (
        "link",
        f"{say_bits_per_second(found.link.bits_per_s)} each way, {origin}; round trip "
        f"{1000 * found.link.round_trip_s:.2g} ms",
    )
    yield "tokens", f"{found.tokens:,}"
    yield "up", f"{say_seconds(each.up_s)}: {say_bytes(found.bytes_up)}"
    yield "down", f"{say_seconds(each.down_s)}: {say_bytes(each.egress_bytes)}"
    yield (
        "workers",
        f"{say_seconds(each.worker_s)} at {rates.operations_per_s / 1e12:g}·10^12 operations/s (assumed)",
    )
    if costs is not None and each.client_s is not None and each.local_s is not None:
        cores = "1 core" if costs.cores == 1 else f"{costs.cores} cores"
        yield "client", f"{say_seconds(each.client_s)}: {1000 * costs.client_s:.2g} ms a token, {cores}"
        yield "job", f"{say_seconds(each.job_s)} at least, limited by {_LIMITS[each.bottleneck]}"
        yield "trained here", f"{say_seconds(each.local_s)}: {1000 * costs.local_s:.2g} ms a token, {cores}"
        even = "none" if each.break_even_bits is None else say_bits_per_second(each.break_even_bits)
        yield "break-even link", even
    if memory is not None:
        yield (
            "memory",
            f"client {say_bytes(memory.client)}, trained here {say_bytes(memory.local)}, of "
            f"{say_bytes(memory.limit)}",
        )
    yield "hints on disk", say_bytes(hint_bytes)
    yield (
        "egress",
        f"{say_bytes(each.egress_bytes)}: {each.egress_usd:,.2f} USD at {rates.egress_price:g} a GB",
    )
