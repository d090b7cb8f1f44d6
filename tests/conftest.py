"""Models that several test files share; cores and a lock, for processes that run tests side by side."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, for this process and all that tests start.
if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, str(max(1, len(os.sched_getaffinity(0)) // processes)))

# A cache of the run's own, shared by its processes: hints go there, converted models are found there.
if "HETRAIN_TEST_CACHE" not in os.environ:
    from hetrain.public.model.files import cache_directory, resolve

    resolve("smollm2-135m")
    cache = Path(tempfile.mkdtemp(prefix="hetrain-test-cache-"))
    for path in cache_directory().iterdir():
        if path.name != "hints":
            (cache / path.name).symlink_to(path)
    os.environ["HETRAIN_TEST_CACHE"] = os.environ["HETRAIN_CACHE"] = str(cache)
    # Nor does any test list its jobs among the user's.
    os.environ["HETRAIN_STATE"] = str(cache / "state")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)

import pytest
import torch
from hypothesis import settings
from transformers import AutoTokenizer

from hetrain.public.model.files import resolve
from tests.harness.exclusive import machine_lock
from tests.harness.tiny_model import save_tiny_llama

settings.register_profile("hetrain", deadline=None)  # tests run beside others, so no example has a time
settings.load_profile("hetrain")
pytest.register_assert_rewrite(
    *(f"tests.harness.{module}" for module in ("agreement", "faults", "split_model", "trl_rows"))
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Runs a test that is marked `alone` while no other process runs one."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    base = item.config.getoption("basetemp")
    with machine_lock(Path(base).parent, exclusive=item.get_closest_marker("alone") is not None):
        return (yield)


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The Hugging Face directory of SmolLM2-135M."""
    return resolve("smollm2-135m").directory


@pytest.fixture(scope="session")
def tiny_llama(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with SmolLM2's tokenizer: real in all but size."""
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_tiny_llama(directory, len(AutoTokenizer.from_pretrained(smollm2_dir)))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2_dir / name, directory)
    return directory


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny matrices are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """Commands that run in this process set it for good (``--quiet``)."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
