"""`make sanitize`: the kernels in C under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("hetrain", "tasks", "worker_gpu", "cli", "tests", "pyproject.toml")
FLAGS = "-shared -fPIC -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
# Ring, masks and layers; of the worker's kernels the 16-bit products and those that use its epilogue.
TESTS = ("tests/unit/test_ring.py", "tests/unit/test_fused_layers.py", "tests/unit/test_kernels.py")
CHOSEN = "ring or layers or switched or hints or epilogue or int16"
PAST_THE_END = "int past_the_end(int *values, int count) { return values[count]; }"
CALL_IT = """
import ctypes, sys, numpy
values = numpy.zeros(1000, numpy.int32)
ctypes.CDLL(sys.argv[1]).past_the_end(ctypes.c_void_p(values.ctypes.data), 1000)
"""


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[:1]


def build(sources: list[Path], target: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*compiler(), *options, *FLAGS.split(), *map(str, sources), "-o", str(target)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """That of a process in which sanitized libraries can be loaded."""
    probe = tmp_path_factory.mktemp("probe")
    (probe / "probe.c").write_text(PAST_THE_END)
    if shutil.which(compiler()[0]) is None:
        pytest.skip("there is no C compiler")
    if (done := build([probe / "probe.c"], probe / "probe.so")).returncode:
        pytest.skip(f"the compiler has no sanitizers: {done.stderr.splitlines()[-1:]}")
    libraries = [
        subprocess.check_output([*compiler(), f"-print-file-name=lib{name}.so"], text=True).strip()
        for name in ("asan", "ubsan")
    ]
    if not all(map(os.path.isabs, libraries)):
        pytest.skip("the compiler's sanitizers cannot be preloaded")
    prepared = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_ADDOPTS"):
        prepared.pop(name, None)
    # That a sanitizer is at work: it ends a process that reads one integer too many.
    wrong = subprocess.run(
        [sys.executable, "-c", CALL_IT, probe / "probe.so"], env=prepared, capture_output=True, text=True
    )
    assert wrong.returncode != 0
    assert "heap-buffer-overflow" in wrong.stderr
    return prepared


def test_no_kernel_leaves_its_memory(environment: dict[str, str], tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, tree)
    extensions = tomllib.loads((tree / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    for extension in extensions:
        target = tree / (extension["name"].replace(".", "/") + sysconfig.get_config_var("EXT_SUFFIX"))
        includes = [f"-I{tree / directory}" for directory in extension["include-dirs"]]
        options = [*extension["extra-compile-args"], *includes]
        done = build([tree / source for source in extension["sources"]], target, *options)
        assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-k", CHOSEN, *TESTS]
    tested = subprocess.run(
        command, cwd=tree, env=environment | {"PYTHONPATH": str(tree)}, capture_output=True, text=True
    )
    assert tested.returncode == 0, f"{tested.stdout[-5000:]}\n{tested.stderr[-5000:]}"
    assert " passed" in tested.stdout
    assert "not compiled" not in tested.stdout
