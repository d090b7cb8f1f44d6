"""`make wheel`: built from a copy of the tree, installed into a clean environment, and used from there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import hetrain

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("Makefile", "pyproject.toml", "README.md", "LICENSE")
PACKAGES = ("hetrain", "tasks", "worker_gpu", "cli")

USE = """
import importlib.metadata, sys, torch
import cli, hetrain, tasks, worker_gpu
from hetrain.secret.engines.rlwe.native.ring_library import NativeRing
from hetrain.secret.engines.rlwe.ring_kernels import ring_kernels
from worker_gpu import epilogue, int16

for package in (cli, hetrain, tasks, worker_gpu):
    assert package.__file__.startswith(sys.prefix), package.__file__
assert importlib.metadata.version("hetrain") == hetrain.__version__
assert isinstance(ring_kernels(), NativeRing)
assert epilogue.native() is not None
assert int16.best_instructions() is not None
print("used")
"""


def run(*command: str | Path, cwd: Path, timeout: float = 300) -> str:
    """Standard output of a command that succeeds and sees nothing of this checkout."""
    hidden = ("PYTHONPATH", "HETRAIN_BROKER_URL", "MAKEFLAGS", "MAKELEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The only wheel that `make wheel` leaves, from sources without anything compiled."""
    tree = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copy(ROOT / name, tree)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    # READY is empty: the environment of this test is the one that builds.
    run("make", "wheel", "READY=", f"BIN={Path(sys.executable).parent}", cwd=tree)
    (found,) = (tree / "dist").iterdir()
    return found


def test_it_is_a_manylinux_wheel_with_kernels_types_and_licence(wheel: Path) -> None:
    name, version, python, _, platform = wheel.stem.split("-")
    assert (name, version, python) == (
        "hetrain",
        hetrain.__version__,
        f"cp{sys.version_info[0]}{sys.version_info[1]}",
    )
    assert all(tag.startswith("manylinux") for tag in platform.split("."))
    files = zipfile.ZipFile(wheel).namelist()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for extension in (
        "hetrain/public/lattice/native/_masks",
        "hetrain/secret/engines/rlwe/native/_ring",
        "hetrain/nn/native/_layers",
        "worker_gpu/native/_epilogue",
        "worker_gpu/native/_int16",
    ):
        assert f"{extension}{suffix}" in files
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(files)
    assert f"hetrain-{version}.dist-info/licenses/LICENSE" in files
    assert {file.split("/")[0] for file in files} == {*PACKAGES, f"hetrain-{version}.dist-info"}
    modules = {str(file.relative_to(ROOT)) for package in PACKAGES for file in (ROOT / package).rglob("*.py")}
    assert modules == {file for file in files if file.endswith(".py")}


def test_it_works_from_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """The heavy dependencies are this environment's, by path; hetrain itself is the wheel's alone."""
    clean = tmp_path / "clean"
    venv.create(clean, symlinks=True)
    python = clean / "bin" / "python"
    (site,) = clean.glob("lib/python*/site-packages")
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=tmp_path,
    )
    # Python does not read .pth files in such a path, so an editable hetrain there stays out of sight.
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    assert run(python, "-c", USE, cwd=tmp_path) == "used\n"
    assert run(clean / "bin" / "hetrain", "--version", cwd=tmp_path).strip() == hetrain.__version__
    # A broker, a worker, and every engine on it.
    report = run(clean / "bin" / "hetrain", "doctor", cwd=tmp_path)
    assert "rlwe" in report
    assert hetrain.__version__ in report
