"""TensorBoard and W&B: refused where they are not installed, and what they get where they are."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from hetrain.public.errors import UsageError
from hetrain.train.evaluation import Evaluation
from hetrain.train.metrics import MicroBatchMetrics
from hetrain.train.tracking import open_tracker, require_trackers

EVALUATION = Evaluation(loss=1.5, perplexity=4.5, targets=3, tokens=4, seconds=0.1)


def metrics(step: int, loss: float, targets: int) -> MicroBatchMetrics:
    values: dict[str, Any] = dict.fromkeys(MicroBatchMetrics.__dataclass_fields__, 0)
    return MicroBatchMetrics(
        **values
        | {"step": step, "loss": loss, "targets": targets, "learning_rate": 0.5, "grad_norm": float("nan")}
        | {"staleness": 1, "update_tokens": 9, "rejected_workers": (), "devices": (), "workers": {}}
    )


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A package of that name that keeps what it gets, or fails."""
    (tmp_path / "wandb.py").write_text(
        textwrap.dedent("""
            calls = []
            class Error(Exception): pass
            class Run:
                def log(self, figures, step):
                    if step == 13:
                        raise Error("no connection")
                    calls.append((step, figures))
                def finish(self): calls.append("finish")
            def init(**given):
                if given["name"] == "refused":
                    raise Error("not logged in")
                calls.append(given)
                return Run()
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb as package

    monkeypatch.setitem(sys.modules, "wandb", package)
    return package.calls  # type: ignore[no-any-return,attr-defined]


def test_a_tracker_gets_losses_and_rates_and_neither_rows_nor_paths(
    wandb: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    require_trackers(("none", "wandb"))
    with open_tracker(("wandb",), tmp_path / "run", {"r": 4}) as tracker:
        tracker.update([metrics(1, 1.0, 3), metrics(1, 3.0, 1)])
        tracker.evaluation(1, EVALUATION)
        tracker.update([metrics(13, 1.0, 1)])
        tracker.update([metrics(14, 1.0, 1)])
    figures = {"train/loss": 1.5, "train/learning_rate": 0.5, "train/staleness": 1.0, "train/tokens": 9.0}
    assert wandb == [
        {"dir": str(tmp_path / "run"), "name": "run", "config": {"r": 4}},
        (1, figures),
        (1, {"eval/loss": 1.5, "eval/perplexity": 4.5}),
    ]
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert warning == "nothing more is reported to Wandb: no connection"
    with pytest.raises(UsageError, match="wandb does not start: not logged in"):
        open_tracker(("wandb",), tmp_path / "refused", {})


def test_what_is_not_installed_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    program = (
        "import sys, importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'tensorboard' else find(name, *more)\n"
        "from cli.main import main\ntry:\n    main()\nfinally:\n"
        "    sys.exit('heavy') if 'torch' in sys.modules else None\n"
    )
    command = [sys.executable, "-c", program, "submit", "rows.jsonl", "--report-to", "tensorboard"]
    root = str(Path(__file__).resolve().parents[2])
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": root})
    assert result.returncode == 2, result.stderr
    assert "error: --report-to: tensorboard is not installed" in result.stderr
    assert not (tmp_path / "out").exists()


def test_tensorboard_reads_what_was_reported(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_tracker(("tensorboard",), tmp_path, {}) as tracker:
        tracker.update([metrics(1, 1.0, 3), metrics(1, 3.0, 1)])
        tracker.evaluation(1, EVALUATION)
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert [(each.step, each.value) for each in events.Scalars("train/loss")] == [(1, 1.5)]
    assert [(each.step, each.value) for each in events.Scalars("eval/loss")] == [(1, 1.5)]
