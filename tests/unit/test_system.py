"""What a process may use, and what its children inherit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hetrain.public.system import available_cores, child_environment, flush_denormals
from hetrain.train.step import step_threads

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


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def denormal_products() -> tuple[bool, bool]:
    """Whether there are any in Python, and in an operation that torch divides among its threads."""
    assert torch.get_num_threads() == 2
    x = torch.full((1 << 20,), 1e-30)
    return sys.float_info.min / 2 > 0, bool((x * 1e-10).any())


@pytest.mark.usefixtures("two_threads")
def test_threads_of_steps_flush_denormals_and_others_do_not() -> None:
    with step_threads(2, lambda: None) as pool:
        assert [each.result() for each in [pool.submit(denormal_products) for _ in range(8)]] == [
            (False, False)
        ] * 8
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(denormal_products).result() == (True, True)


@pytest.mark.usefixtures("two_threads")
def test_a_thread_inherits_the_flushing_of_denormals_which_can_be_undone() -> None:
    assert not flush_denormals()
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(denormal_products).result() == (False, False)
    finally:
        assert flush_denormals(False)
    assert denormal_products()[0]
