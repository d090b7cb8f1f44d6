"""What a process may use, and what its children inherit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hetrain.public.system import available_cores, child_environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="affinity masks")
def test_cores_are_those_of_the_affinity_mask() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from hetrain.public.system import available_cores; print(available_cores())"
    )
    assert int(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT)) == 1
    assert available_cores() >= 1


def test_a_child_runs_this_code_and_none_of_its_working_directory(tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text("raise SystemExit('the wrong module')")
    code = "from importlib.util import find_spec; print(find_spec('tasks').origin)"
    command = [sys.executable, "-c", code]
    origin = subprocess.check_output(command, cwd=tmp_path, env=child_environment(), text=True)
    assert Path(origin.strip()) == ROOT / "tasks" / "__init__.py"
