"""`hetrain plan`: what would be outsourced, and whether that pays."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from cli import comparison
from cli.options import AsJson, as_options, option
from hetrain import api
from hetrain.config import AUTO, ComparisonConfig, DataConfig, JobSpec, OutsourcingConfig, TrainingConfig
from hetrain.public.spelling import say_alike, starred

_ALL = list(OutsourcingConfig.outsource)
_NO_ROWS: list[str] = []
_DATA = DataConfig()
_TRAINING = TrainingConfig()
_COMPARISON = ComparisonConfig()


def plan(
    model: Annotated[str, typer.Argument(help="smollm2-135m, a Hugging Face directory, or a hub id.")],
    outsource: Annotated[list[str], option(OutsourcingConfig, "outsource")] = _ALL,
    dataset: Annotated[
        list[str],
        typer.Option(
            help="Rows as of `hetrain submit`, for the number of updates and their bytes; may be repeated.",
            show_default=False,
        ),
    ] = _NO_ROWS,
    text_field: Annotated[str, option(DataConfig, "text_field")] = _DATA.text_field,
    prompt_field: Annotated[str, option(DataConfig, "prompt_field")] = _DATA.prompt_field,
    completion_field: Annotated[str, option(DataConfig, "completion_field")] = _DATA.completion_field,
    strict: Annotated[bool, option(DataConfig, "strict")] = _DATA.strict,
    completion_only_loss: Annotated[bool | None, option(DataConfig, "completion_only_loss")] = None,
    assistant_only_loss: Annotated[
        bool, option(DataConfig, "assistant_only_loss")
    ] = _DATA.assistant_only_loss,
    dataset_config: Annotated[str | None, option(DataConfig, "dataset_config")] = None,
    dataset_train_split: Annotated[
        str, option(DataConfig, "dataset_train_split")
    ] = _DATA.dataset_train_split,
    max_length: Annotated[int | None, option(TrainingConfig, "max_length")] = None,
    batch_tokens: Annotated[int | None, option(TrainingConfig, "batch_tokens")] = None,
    gradient_accumulation_steps: Annotated[
        int | None, option(TrainingConfig, "gradient_accumulation_steps")
    ] = None,
    micro_batch_tokens: Annotated[
        int, option(TrainingConfig, "micro_batch_tokens")
    ] = _TRAINING.micro_batch_tokens,
    in_flight: Annotated[int, option(TrainingConfig, "in_flight")] = _TRAINING.in_flight,
    max_staleness: Annotated[int, option(TrainingConfig, "max_staleness")] = _TRAINING.max_staleness,
    max_steps: Annotated[int, option(TrainingConfig, "max_steps")] = _TRAINING.max_steps,
    num_train_epochs: Annotated[
        float, option(TrainingConfig, "num_train_epochs")
    ] = _TRAINING.num_train_epochs,
    link: Annotated[str | None, option(ComparisonConfig, "link")] = None,
    broker_url: Annotated[str | None, option(JobSpec, "workers")] = None,
    round_trip_ms: Annotated[float | None, option(ComparisonConfig, "round_trip_ms")] = None,
    worker_speed: Annotated[float, option(ComparisonConfig, "worker_speed")] = _COMPARISON.worker_speed,
    egress_price: Annotated[float, option(ComparisonConfig, "egress_price")] = _COMPARISON.egress_price,
    client_memory: Annotated[int | None, option(ComparisonConfig, "client_memory")] = None,
    probe: Annotated[bool | None, option(ComparisonConfig, "probe")] = None,
    as_json: AsJson = False,
) -> None:
    """Show which matrices would leave, what a token costs on the wire, and whether outsourcing pays."""
    compared = ComparisonConfig(
        link=link,
        round_trip_ms=round_trip_ms,
        worker_speed=worker_speed,
        egress_price=egress_price,
        client_memory=client_memory,
        probe=probe,
    )
    data = DataConfig(
        text_field=text_field,
        prompt_field=prompt_field,
        completion_field=completion_field,
        strict=strict,
        completion_only_loss=completion_only_loss,
        assistant_only_loss=assistant_only_loss,
        dataset_config=dataset_config,
        dataset_train_split=dataset_train_split,
    )
    training = TrainingConfig(
        max_length=max_length,
        batch_tokens=batch_tokens,
        gradient_accumulation_steps=gradient_accumulation_steps,
        micro_batch_tokens=micro_batch_tokens,
        in_flight=in_flight,
        max_staleness=max_staleness,
        max_steps=max_steps,
        num_train_epochs=num_train_epochs,
    )
    found = api.plan(
        model,
        outsource=outsource,
        training=training,
        dataset=dataset,
        data=data,
        comparison=compared,
        workers=broker_url,
    )
    chosen = found.patterns if AUTO in outsource else outsource
    if as_json:
        report = {
            "model": model,
            "outsource": chosen,
            "digest": found.plan.digest,
            "share": found.share,
            "outsourced_parameters": found.outsourced_parameters,
            "client_parameters": found.client_parameters,
            "hint_bytes": found.hint_bytes,
            "client_linears": found.kept,
            "update": {
                "batch_tokens": training.tokens_per_update,
                "micro_batches": training.batches_per_update,
                "tokens_per_micro_batch": training.tokens_per_micro_batch,
                "at_once": training.replicas,
                "max_staleness": training.max_staleness,
            },
            "course": None if found.course is None else asdict(found.course),
            "comparison": found.comparison and comparison.as_json(found.comparison),
            "groups": [asdict(group) | {"group": group.group.model_dump()} for group in found.groups],
        }
        typer.echo(json.dumps(report))
        return
    console = Console()
    print_plan(console, found)
    if AUTO in outsource:
        options = " ".join(f"--outsource '{pattern}'" for pattern in chosen)
        console.print(f"To outsource at this link: {options or 'nothing'}", highlight=False, soft_wrap=True)
    if found.comparison is not None:
        comparison.print_comparison(console, found.comparison, found.hint_bytes)


def print_plan(console: Console, found: api.PlanReport) -> None:
    """Prints what would leave, an update, and the updates of a training."""
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
    console.print(_update(found.training), highlight=False)
    if found.course is not None:
        console.print(_course(found, found.course), highlight=False)
    if found.kept:
        console.print(
            f"The client's {found.client_parameters:,} parameters include {len(found.kept)} linears of "
            f"decoder blocks: {say_alike(found.kept)}.",
            highlight=False,
        )


def _update(training: TrainingConfig) -> str:
    """What an update consists of, and when the next one starts."""
    width, tokens = training.batches_per_update, training.tokens_per_micro_batch
    parts = "one micro-batch" if width == 1 else f"{width} micro-batches of at most {tokens}"
    start = "when it is made (lock step)"
    if training.max_staleness:
        start = f"before it is made: up to {training.max_staleness} more overlap with it after warm-up"
    return (
        f"An update takes up to {training.tokens_per_update} tokens in {parts}, {training.replicas} under "
        f"way at once; the next one starts {start}."
    )


def _course(found: api.PlanReport, course: api.Course) -> str:
    """What a training on the data set is, and a warning if it will learn worse than it could."""
    shared = ""
    if course.epoch_tokens < course.row_tokens:
        shared = f", of which a pass computes {course.epoch_tokens} since rows share a prompt"
    text = (
        f"The data set has {course.rows} rows of {course.row_tokens} tokens in all{shared}. A training makes "
        f"{course.updates} updates over about {course.tokens} tokens, "
        f"{course.tokens * found.bytes_per_token / 1e9:.1f} GB on the wire."
    )
    warning = found.training.warning(course.updates)
    return text if warning is None else f"{text} Warning: {as_options(warning)}."


def _alike(found: api.PlanReport) -> dict[str, list[api.GroupReport]]:
    """Groups that differ in their layer's number only, by their common name."""
    alike: dict[str, list[api.GroupReport]] = {}
    for row in found.groups:
        group = row.group
        members = ", ".join(member.module.rpartition(".")[2] for member in group.members)
        name = f"{starred(group.name).rpartition('.')[0]}: {members}"
        alike.setdefault(name, []).append(row)
    return alike
