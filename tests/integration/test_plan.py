"""`hetrain plan` with a link: the job beside training on this machine, which is really measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import hetrain as product
from cli.plan import plan as plan_command
from cli.submit import submit as submit_command
from hetrain.inspection import comparison, local_probe
from hetrain.inspection.crypto_probe import CryptoCosts
from hetrain.inspection.link import measure_link
from hetrain.inspection.stopwatch import seconds_per_token
from hetrain.nn.families import block_linears
from hetrain.public.errors import BrokerFull, BrokerUnreachable, UsageError
from hetrain.public.model.files import resolve
from hetrain.public.spelling import starred
from tests.harness.processes import HANDBOOK, broker_server, connect, hetrain
from tests.harness.split_model import FAMILIES, save_model

SMALL = ("--micro-batch-tokens", 256, "--max-length", 64, "--batch-tokens", 256)


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    """A broker without workers."""
    with broker_server() as server:
        yield server.url


def compared(*arguments: object) -> dict[str, Any]:
    result = hetrain("plan", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def submit(*arguments: object) -> None:
    app = typer.Typer()
    app.command()(submit_command)
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def in_process(*arguments: object) -> dict[str, Any]:
    app = typer.Typer()
    app.command()(plan_command)
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_job_is_compared_with_training_here(tiny_llama: Path) -> None:
    plan = compared(tiny_llama, "--dataset", HANDBOOK, "--link", "1mbit", *SMALL, "--egress-price", "0.5")
    found = plan["comparison"]
    each, costs = found["estimate"], found["costs"]
    assert found["tokens"] == plan["course"]["tokens"]
    assert found["link"] == {"bits_per_s": 1e6, "round_trip_s": 0.0}
    values = sum(group["group"]["in_features"] + sum(m["out_features"] for m in group["group"]["members"])
                 for group in plan["groups"])  # fmt: skip
    assert found["bytes_up"] == 3 * values * found["tokens"]
    assert each["up_s"] == pytest.approx(8 * found["bytes_up"] / 1e6)
    assert each["egress_usd"] == pytest.approx(0.5 * each["egress_bytes"] / 1e9)
    assert 0 < costs["local_s"] < 0.1
    assert each["local_s"] == pytest.approx(costs["local_s"] * found["tokens"] / costs["cores"])
    assert found["probe"]["layers"] == 2
    assert 0 < found["memory"]["client"] < found["memory"]["limit"]
    # So small a model is trained faster here than its values travel.
    assert each["verdict"] == "train locally"
    assert "Train locally, outsourcing does not pay here" in each["sentence"]


def test_plan_reads_rows_as_training_does(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer\nWho sings?, Herrings.\n")
    (tmp_path / "b.jsonl").write_text('{"question": "When?", "answer": " At dusk."}\n')
    names = ("--dataset", tmp_path / "a.csv", "--dataset", tmp_path / "b.jsonl")
    columns = ("--prompt_field", "question", "--completion-field", "answer", "--strict")
    planned = hetrain("plan", tiny_llama, *names, *columns, "--json")
    assert planned.returncode == 0, planned.stderr
    data = product.DataConfig(prompt_field="question", completion_field="answer")
    found = product.plan(str(tiny_llama), dataset=[tmp_path / "a.csv", tmp_path / "b.jsonl"], data=data)
    course = found.course
    assert course is not None
    assert json.loads(planned.stdout)["course"] == asdict(course)
    assert course.rows == 2
    refused = hetrain("plan", tiny_llama, *names)
    assert refused.returncode == 3
    assert "name your columns by --text-field, --prompt-field and --completion-field" in refused.stderr


def test_it_is_said_in_a_table_and_a_sentence(tiny_llama: Path) -> None:
    result = hetrain(
        "plan", tiny_llama, "--link", "2.5gbit", "--round-trip-ms", 20, "--client-memory", "1kB", *SMALL
    )
    said = " ".join(result.stdout.split())
    assert "2.5 Gbit/s each way, given; round trip 20 ms" in said
    assert "tokens 1,000,000" in said
    assert "0.09 a GB" in said
    assert "lower --micro-batch-tokens, or outsource more" in said


def test_without_a_probe_nothing_is_said_about_this_machine(tiny_llama: Path) -> None:
    found = compared(tiny_llama, "--link", "1gbit", "--no-probe", *SMALL)["comparison"]
    assert (found["probe"], found["costs"], found["memory"], found["note"]) == (None, None, None, "")
    assert found["estimate"]["verdict"] == "undecided"
    assert compared(tiny_llama)["comparison"] is None


def test_auto_leaves_nothing_where_nothing_pays(tiny_llama: Path) -> None:
    slow = compared(tiny_llama, "--link", "1kbit", "--outsource", "auto", *SMALL)
    assert (slow["groups"], slow["outsource"], len(slow["client_linears"])) == ([], [], 14)
    assert (slow["share"], slow["comparison"]["bytes_up"]) == (0, 0)


@pytest.fixture
def slow_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which linears are slow and encryption is free."""
    crypto = CryptoCosts(seal_s=1e-12, open_s=1e-12, byte_s=0.0)
    found = local_probe.Probe(
        layers=2,
        block_weights=30_000,
        local_block_s=0.1,
        client_block_s=0.0,
        weight_s=3e-6,
        local_head_s=0.0,
        client_head_s=10.0,
        client_softmax_s=0.0,
        local_saved=0.0,
        client_saved=0.0,
        crypto=crypto,
    )
    monkeypatch.setattr(comparison, "probe", lambda *given: found)
    monkeypatch.setattr(comparison, "available_cores", lambda: 1)
    monkeypatch.delenv("HETRAIN_BROKER_URL", raising=False)


@pytest.mark.usefixtures("slow_here")
def test_auto_names_patterns_that_take_just_its_groups(tiny_llama: Path) -> None:
    sizes = set()
    for link in ("1kbit", "30kbit", "100kbit", "300kbit", "1mbit", "1tbit"):
        chosen = in_process(tiny_llama, "--link", link, "--outsource", "auto", *SMALL)
        sizes.add(len(chosen["groups"]))
        if chosen["groups"]:
            given = [word for pattern in chosen["outsource"] for word in ("--outsource", pattern)]
            again = in_process(tiny_llama, "--link", link, *given, *SMALL)
            for name in (
                "digest",
                "share",
                "client_parameters",
                "client_linears",
                "hint_bytes",
                "comparison",
            ):
                if name == "comparison":
                    chosen[name]["memory"]["limit"] = again[name]["memory"]["limit"]
                assert chosen[name] == again[name]
    assert {0, 14} < sizes
    assert chosen["outsource"][0] == "model.layers.*.self_attn.q_proj"


@pytest.mark.usefixtures("slow_here", "one_thread")
def test_a_job_keeps_the_groups_that_auto_has_chosen(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    planned = in_process(tiny_llama, "--link", "300kbit", "--outsource", "auto", *SMALL)
    assert 0 < len(planned["groups"]) < 14

    def run(steps: int, *more: object) -> dict[str, Any]:
        options = ("-m", tiny_llama, "-o", tmp_path, "--max-steps", steps, "--outsource", "auto", *SMALL)
        submit(HANDBOOK, *options, *more)
        job: dict[str, Any] = json.loads((tmp_path / "job.json").read_text())
        return job

    with caplog.at_level("INFO", "hetrain.inspection.automatic"):
        job = run(1, "--link", "300kbit")
    assert job["outsourcing"]["outsource"] == planned["outsource"]
    assert job["plan_digest"] == planned["digest"]
    (said,) = (each.getMessage() for each in caplog.records if each.name == "hetrain.inspection.automatic")
    assert said.startswith("outsource auto, over 300 kbit/s: ")
    assert all(starred(name) in said for name in planned["client_linears"])

    monkeypatch.delattr(comparison, "probe")  # the next run measures nothing
    job = run(2, "--resume-from-checkpoint", "latest")
    assert (job["steps"], job["plan_digest"]) == (2, planned["digest"])


@pytest.mark.usefixtures("slow_here")
@pytest.mark.parametrize(
    ("options", "field", "hint"),
    [
        (("--outsource", "auto", "--link", "1kbit"), "outsource", "train locally"),
        (("--outsource", "auto"), "link", "`workers`"),
        (("--link", "1gbit"), "link", "`outsource` auto"),
    ],
)
def test_auto_is_refused_to_a_job(
    tiny_llama: Path, tmp_path: Path, options: tuple[str, ...], field: str, hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        submit(HANDBOOK, "-m", tiny_llama, "-o", tmp_path, *SMALL, *options)
    assert caught.value.field == field
    assert hint in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_auto_is_for_jobs(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match="auto is for training jobs"):
        product.prepare(str(tiny_llama), outsource=["auto"])


@pytest.mark.parametrize(
    ("arguments", "option", "advice"),
    [
        (("--link", "1MB"), "--link", "100mbit"),
        (("--link", "measured"), "--link", "--broker-url"),
        (("--outsource", "auto"), "--outsource", "--link"),
        (("--outsource", "auto", "--link", "1gbit", "--no-probe"), "--outsource", "--probe"),
        (("--outsource", "auto", "--outsource", "*", "--link", "1gbit"), "--outsource", "alone"),
        (("--outsource", "auto", "--outsource", "auto", "--link", "1gbit"), "--outsource", "alone"),
        (("--probe",), "--probe", "--link"),
        (("--link", "1gbit", "--worker-speed", 0), "--worker-speed", ""),
        (("--link", "1gbit", "--egress-price", -1), "--egress-price", ""),
        (("--link", "1gbit", "--client-memory", "much"), "--client-memory", "2GiB"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tiny_llama: Path, arguments: tuple[object, ...], option: str, advice: str
) -> None:
    result = hetrain("plan", tiny_llama, *arguments)
    assert result.returncode == 2
    assert option in result.stderr
    assert advice in result.stderr


def test_the_link_is_measured_and_nothing_is_left(tiny_llama: Path, broker: str) -> None:
    plan = compared(tiny_llama, "--link", "measured", "--broker-url", broker, "--no-probe")
    found = plan["comparison"]
    assert found["link_measured"]
    assert found["link"]["bits_per_s"] > 1e7
    assert 0 < found["link"]["round_trip_s"] < 1
    assert connect(broker).dbsize() == 0


def test_a_broker_that_cannot_take_it_is_said() -> None:
    with broker_server(maxmemory=3 << 20) as small:
        with pytest.raises(BrokerFull):
            measure_link(small.url)
        assert small.connect().dbsize() == 0
    with pytest.raises(BrokerUnreachable):
        measure_link("redis://127.0.0.1:1/0")


def test_without_memory_for_a_block_there_is_a_note(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_probe, "_SPARE_BYTES", 1 << 60)
    link = product.ComparisonConfig(link="1gbit")
    found = product.plan(str(tiny_llama), comparison=link).comparison
    assert found is not None
    assert found.probe is None
    assert "one block takes" in found.note
    with pytest.raises(UsageError, match="one block takes"):
        product.plan(str(tiny_llama), comparison=link, outsource=["auto"])


def test_a_probe_scales_with_the_model(tiny_llama: Path) -> None:
    found = local_probe.probe(resolve(str(tiny_llama)), row_tokens=64, most_tokens=256)
    block = local_probe.skeleton(resolve(str(tiny_llama)), 1)
    linears = block_linears(block).values()
    assert found.block_weights == sum(linear.weight.numel() for linear in linears)
    assert found.client_block_s > 0
    assert found.local_block_s > 0
    assert min(found.weight_s, found.crypto.seal_s, found.crypto.open_s) > 0
    # A hundred values a token and linear, of 4 bytes here and 2 there.
    assert found.client_saved < found.local_saved < 1e5


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma2", "phi", "deepseek-v3-dense"])
def test_families_can_be_measured(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_probe, "BUDGETS_S", dict.fromkeys(local_probe.BUDGETS_S, 0.0))
    save_model(FAMILIES[name], tmp_path)
    assert local_probe.probe(resolve(str(tmp_path)), row_tokens=13, most_tokens=128).local_block_s > 0


def test_a_stopwatch_counts_the_processor_and_keeps_its_budget() -> None:
    x, asked = torch.ones(1000), []

    def step(tokens: int) -> None:
        asked.append(tokens)
        for _ in range(tokens):
            x.sum()

    assert 1e-7 < seconds_per_token(step, 256, 5.0) < 1e-3
    assert asked == [64, 64, 128, 256, 256, 256]
    asked.clear()
    seconds_per_token(step, 256, 0.0)
    assert asked == [64, 64]
