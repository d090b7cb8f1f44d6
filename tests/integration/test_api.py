"""The way in from Python, as the package's own documentation shows it."""

from __future__ import annotations

import csv
import json
import shutil
import textwrap
from contextlib import ExitStack
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

import hetrain
from hetrain.public.errors import UsageError
from tests.harness.processes import HANDBOOK, broker_with_worker


def documented_lines() -> str:
    """The example in the package's docstring."""
    assert hetrain.__doc__ is not None
    block = [line for line in hetrain.__doc__.splitlines() if line.startswith("    ")]
    return textwrap.dedent("\n".join(block))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("place", ["embedded", "broker"])
def test_the_documented_lines_run_as_written(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    """With a tiny model under the name in the cache, and the elided address filled in."""
    cache = tmp_path / "cache"
    shutil.copytree(tiny_llama, cache / "smollm2-135m")
    monkeypatch.setenv("HETRAIN_CACHE", str(cache))
    monkeypatch.delenv("HETRAIN_BROKER_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "held_out.jsonl"):  # few: a micro-batch in the smallest ring
        Path(name).write_text("".join(HANDBOOK.read_text().splitlines(keepends=True)[:6]))
    lines, elided = documented_lines(), '"rediss://..."'
    assert lines.count(elided) == 1
    assert lines.splitlines()[-1] == 'hetrain.evaluate("held_out.jsonl", adapter="out").loss'
    names: dict[str, Any] = {}
    with ExitStack() as stack:
        address = None
        if place == "broker":
            address = stack.enter_context(broker_with_worker("smollm2-135m")).url
        exec(
            lines.replace(elided, repr(address)).replace("hetrain.evaluate", "loss = hetrain.evaluate"), names
        )
    result = names["result"]
    assert (result.steps, result.total_steps, result.output_dir) == (20, 20, Path("out"))
    assert repr(result).startswith("JobResult(steps=20, total_steps=20, tokens=")
    assert "last" not in repr(result)
    assert str(result).endswith("Adapter in out")
    with pytest.raises(FrozenInstanceError):
        result.steps = 0
    printed = capsys.readouterr().out.splitlines()
    # Two micro-batches an update.
    assert [line.partition(":")[0] for line in printed] == [f"step {1 + i // 2}/20" for i in range(40)]

    # Step 1 has the base model's loss on the rows that are evaluated.
    assert names["loss"] < float(printed[0].partition("loss ")[2].partition(",")[0])


def test_rows_that_are_held_out_are_evaluated_with_the_finished_adapter(
    tiny_llama: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in HANDBOOK.read_text().splitlines()[:24]]
    files = tmp_path / "learned.csv", tmp_path / "held_out.csv"
    for file, some in zip(files, (rows[:16], rows[16:]), strict=True):
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(some)
    clear = hetrain.OutsourcingConfig(engine="clear")
    training = hetrain.TrainingConfig(
        num_train_epochs=1.5, batch_tokens=128, max_length=64, learning_rate=0.01
    )
    data = hetrain.TrainingDataConfig(eval_dataset=(str(files[1]),))
    common = {"model": str(tiny_llama), "training": training, "outsourcing": clear}
    result = hetrain.finetune(files[0], data=data, output_dir=tmp_path / "out", **common)
    again = hetrain.evaluate(files[1], adapter=tmp_path / "out", batching=training, outsourcing=clear)
    assert result.evaluation is not None
    assert result.evaluation.loss == pytest.approx(again.loss, rel=1e-5)
    assert f"held-out loss {again.loss:.3f}" in str(result)
    job = json.loads((tmp_path / "out" / "job.json").read_text())
    assert job["evaluation"]["targets"] == again.targets
    assert (job["status"], job["dataset"]) == ("done", [str(files[0])])

    half = hetrain.TrainingDataConfig(validation_split=0.5)
    result = hetrain.finetune(list(files), data=half, output_dir=tmp_path / "half", **common)
    assert result.evaluation is not None
    assert 0 < result.evaluation.targets < sum(len(row["completion"]) for row in rows)


def test_an_adapter_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no adapter_config") as caught:
        hetrain.evaluate(HANDBOOK, adapter=tmp_path)
    assert caught.value.where == str(tmp_path)


def test_an_unknown_engine_is_refused_before_the_data_set_is_read() -> None:
    with pytest.raises(UsageError, match="'rot13' is not known") as caught:
        hetrain.finetune("/nowhere.jsonl", outsourcing=hetrain.OutsourcingConfig(engine="rot13"))
    assert caught.value.field == "engine"


def test_plan_and_doctor_are_the_commands_of_the_same_names(tiny_llama: Path) -> None:
    plan = hetrain.plan(str(tiny_llama), outsource=["*.mlp.*"])
    assert [len(each.group.members) for each in plan.groups] == [2, 1] * 2
    assert repr(plan).startswith("PlanReport(outsourced_parameters=")
    found = hetrain.doctor("redis://127.0.0.1:1/0")
    assert found.failure is not None
    assert found.failure.exit_code == 7
