"""`hetrain plan`: what would be outsourced."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from cli.options import AsJson, option
from hetrain import api
from hetrain.config import OutsourcingConfig

_ALL = list(OutsourcingConfig.outsource)


def plan(
    model: Annotated[str, typer.Argument(help="smollm2-135m, a Hugging Face directory, or a hub id.")],
    outsource: Annotated[list[str], option(OutsourcingConfig, "outsource")] = _ALL,
    as_json: AsJson = False,
) -> None:
    """Show which matrices would leave for the workers, and what each token would cost on the wire."""
    found = api.plan(model, outsource=outsource)
    if as_json:
        report = {
            "model": model,
            "outsource": outsource,
            "digest": found.plan.digest,
            "share": found.share,
            "outsourced_parameters": found.outsourced_parameters,
            "client_parameters": found.client_parameters,
            "hint_bytes": found.hint_bytes,
            "client_linears": found.kept,
            "groups": [asdict(group) | {"group": group.group.model_dump()} for group in found.groups],
        }
        typer.echo(json.dumps(report))
    else:
        _print(found)


def _print(found: api.PlanReport) -> None:
    title = f"{found.plan.model}: {len(found.groups)} groups, plan {found.plan.digest[:16]}"
    table = Table(title=title, caption="forward / backward", box=SIMPLE)
    table.add_column("linears that share an input", min_width=26, overflow="fold")
    for heading in ("×", "matrix", "bits", "bytes/token"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, rows in _alike(found).items():
        group = rows[0].group
        table.add_row(
            name,
            str(len(rows)),
            f"{group.in_features}→{group.out_features}",
            f"{min(row.forward_bits for row in rows):.1f} / {min(row.backward_bits for row in rows):.1f}",
            f"{sum(row.forward_bytes for row in rows):,} / {sum(row.backward_bytes for row in rows):,}",
        )
    console = Console()
    console.print(table)
    forward = sum(row.forward_bytes for row in found.groups)
    backward = sum(row.backward_bytes for row in found.groups)
    total = found.outsourced_parameters + found.client_parameters
    console.print(
        f"{found.outsourced_parameters:,} of {total:,} parameters ({found.share:.0%}) are held by workers; "
        f"{forward / 1e6:.2f} MB forward and {backward / 1e6:.2f} MB backward per token, with full rings of "
        f"{found.ring_slots} tokens: {found.bytes_up:g} bytes a value up, {found.bytes_down:g} down. Hints "
        f"take {found.hint_bytes / 1e9:.2f} GB of disk, which each micro-batch of a training job reads once.",
        highlight=False,
    )
    if found.kept:
        alike = Counter(_starred(name) for name in found.kept)
        console.print(
            f"The client's {found.client_parameters:,} parameters include {len(found.kept)} linears of "
            f"decoder blocks: {', '.join(f'{name} × {count}' for name, count in alike.items())}.",
            highlight=False,
        )


def _alike(found: api.PlanReport) -> dict[str, list[api.GroupReport]]:
    """Groups that differ in their layer's number only, by their common name."""
    alike: dict[str, list[api.GroupReport]] = {}
    for row in found.groups:
        group = row.group
        members = ", ".join(member.module.rpartition(".")[2] for member in group.members)
        name = f"{_starred(group.name).rpartition('.')[0]}: {members}"
        alike.setdefault(name, []).append(row)
    return alike


def _starred(module: str) -> str:
    return re.sub(r"[.][0-9]+[.]", ".*.", module)
