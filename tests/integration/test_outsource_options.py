"""`--outsource` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

import cli.evaluate
import cli.plan
import cli.submit
from hetrain.public.errors import UsageError
from tests.harness.processes import HANDBOOK

pytestmark = pytest.mark.usefixtures("one_thread")


def call(command: Callable[..., None], *arguments: object) -> Result:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_outsource_on_the_command_line(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HETRAIN_BROKER_URL", raising=False)
    patterns = ("--outsource", "*.1.mlp.*", "--outsource", "*.0.*.o_proj")
    plan = json.loads(call(cli.plan.plan, tiny_llama, "--json", *patterns).stdout)
    assert [len(group["group"]["members"]) for group in plan["groups"]] == [1, 2, 1]
    assert plan["outsourced_parameters"] == 64 * 64 + 3 * 64 * 96
    assert len(plan["client_linears"]) == 14 - 4
    text = call(cli.plan.plan, tiny_llama, *patterns).stdout
    assert f"{plan['client_parameters']:,} parameters include 10 linears" in text

    small = (HANDBOOK, "-m", tiny_llama, "--micro-batch-tokens", "256", "--max-length", "64")
    output = tmp_path / "out"
    result = call(
        cli.submit.submit,
        *small,
        "--batch-tokens",
        "256",
        "-o",
        output,
        "--max-steps",
        "1",
        "--quiet",
        *patterns,
    )
    assert result.exit_code == 0, result.exception
    job = json.loads((output / "job.json").read_text())
    assert job["outsourcing"]["outsource"] == ["*.1.mlp.*", "*.0.*.o_proj"]
    assert job["plan_digest"] == plan["digest"]
    record = json.loads((output / "metrics.jsonl").read_text())
    # Every value up takes 4 bytes, in a ring of 256 slots.
    assert record["bytes_up"] == ((64 + 64 + 96) + (64 + 192 + 64)) * 256 * 3

    refused = call(cli.evaluate.evaluate, *small, "--adapter", output, "--outsource", "mlp.down_proj")
    assert isinstance(refused.exception, UsageError)
    assert "mlp.down_proj" in refused.exception.what
