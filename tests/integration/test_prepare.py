"""`hetrain prepare`: a model's hints, made once, from the command line and by jobs."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.harness.cli_process import run_forked

ROWS = Path(__file__).resolve().parents[1] / "data" / "tiny.jsonl"


def test_hints_are_made_once_and_serve_every_later_job(tiny_llama: Path, tmp_path: Path) -> None:
    environment = os.environ | {"HETRAIN_CACHE": str(tmp_path / "cache")}

    def hetrain(*arguments: object) -> list[dict[str, object]]:
        done = run_forked([*arguments, "--json"], 240, environment)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    (first,) = hetrain("prepare", tiny_llama)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "hints").glob("*.hint")}
    assert first["hints"] == first["made"] == len(files) == 16
    assert first["nbytes"] == sum(path.stat().st_size for path in files)
    assert first["nbytes"] == hetrain("plan", tiny_llama)[0]["hint_bytes"]
    (again,) = hetrain("prepare", tiny_llama)
    assert again["made"] == 0
    small = ("--micro-batch-tokens", 64, "--max-length", 64, "--in-flight", 1, "-m", tiny_llama)
    events = hetrain("submit", ROWS, *small, "--batch-tokens", 64, "--max-steps", 1, "-o", tmp_path / "out")
    assert [event["event"] for event in events] == ["micro_batch", "done"]
    hetrain("eval", ROWS, *small)
    assert files == {path: path.stat().st_mtime_ns for path in files}
