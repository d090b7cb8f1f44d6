"""Each wrong turn ends in one message that names the place and what to do, and in its exit code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hetrain.public.errors import UsageError
from hetrain.public.model.files import resolve
from hetrain.train.adapter_base import require_base
from tasks.supervisor.embedded import trim_log
from tests.harness.cli_process import run_forked
from tests.harness.processes import HANDBOOK, broker_server
from tests.harness.small_disk import SmallDisk, small_disk

SMALL = ("--micro-batch-tokens", 256, "--batch-tokens", 256, "--max-length", 64, "--max-steps", 1)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    """A disk without room, with a directory for a cache and one for output."""
    with small_disk(tmp_path_factory.mktemp("disks") / "full", 1 << 20) as disk:
        for name in ("cache", "out"):
            (disk.path / name).mkdir(mode=0o700)
        disk.fill()
        yield disk


def ends(code: int, *arguments: object, **environment: object) -> str:
    """What the command says when it ends with `code`."""
    variables = os.environ | {name: str(value) for name, value in environment.items()}
    done = run_forked(arguments, 240, variables)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


def test_a_cache_that_cannot_be_made(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "cache"
    for model in (tiny_llama, "smollm2-135m"):
        job = ("submit", HANDBOOK, "-m", model, "-o", tmp_path / "out", *SMALL)
        said = ends(2, *job, HETRAIN_CACHE=place)
        assert str(place) in said
        assert "set HETRAIN_CACHE to a directory of yours" in said


def test_a_cache_on_a_full_disk(tiny_llama: Path, tmp_path: Path, full: SmallDisk) -> None:
    job = ("submit", HANDBOOK, "-m", tiny_llama, "-o", tmp_path / "out", *SMALL)
    said = ends(10, *job, HETRAIN_CACHE=full.path / "cache")
    assert str(full.path / "cache" / "hints") in said
    assert "make room" in said
    assert not list((full.path / "cache" / "hints").iterdir())


def test_output_on_a_full_disk(tiny_llama: Path, full: SmallDisk) -> None:
    job = ("submit", HANDBOOK, "-m", tiny_llama, "-o", full.path / "out", *SMALL, "--engine", "clear")
    said = ends(10, *job)
    assert str(full.path / "out") in said
    assert "make room" in said


def test_output_where_there_is_a_file(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    said = ends(2, "submit", HANDBOOK, "-m", tiny_llama, "-o", tmp_path / "out", *SMALL)
    assert f"{tmp_path / 'out'}: cannot be written" in said
    assert "--output-dir" in said


def test_a_broker_too_small_for_one_product(tmp_path: Path) -> None:
    job = ("submit", HANDBOOK, "-m", "smollm2-135m", "-o", tmp_path / "out", "--max-steps", 1)
    with broker_server(maxmemory=4 << 20) as broker:
        said = ends(7, *job, "--engine", "clear", HETRAIN_BROKER_URL=broker.url)
    assert "one product and its operand take 21 MB, more than the 4 MB that the broker can hold" in said
    assert "--micro-batch-tokens" in said


def test_an_adapter_of_another_model(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_llama)}))
    said = ends(2, "eval", HANDBOOK, "--adapter", adapter, "-m", "smollm2-135m")
    assert f"belongs to {tiny_llama}, not to smollm2-135m" in said
    assert "--model-name-or-path" in said
    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    require_base(adapter, str(copy), resolve(str(copy)))
    weights = load_file(copy / "model.safetensors")
    first = min(weights)
    save_file(weights | {first: weights[first] + 1}, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="belongs to"):
        require_base(adapter, str(copy), resolve(str(copy)))


def test_the_cache_is_shown_and_cleared(tmp_path: Path) -> None:
    files = {"hints/seed": 64, "hints/a.hint": 4096, "smollm2-135m/config.json": 10, "mine/notes": 5}
    for name, size in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(size))

    def cache(*arguments: object) -> dict[str, int]:
        done = run_forked(["cache", "--json", *arguments], 60, os.environ | {"HETRAIN_CACHE": str(tmp_path)})
        assert done.returncode == 0, done.stderr
        return {entry["name"]: entry["nbytes"] for entry in json.loads(done.stdout)["entries"]}

    assert cache() == {"hints": 4160, "smollm2-135m": 10}
    assert cache("smollm2-135m", "--clear") == {"smollm2-135m": 10}
    assert cache() == {"hints": 4160}
    assert "it has: hints" in ends(2, "cache", "mine", "--clear", HETRAIN_CACHE=tmp_path)
    cache("--clear")
    assert cache() == {}
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_log_is_bounded_while_it_is_written(tmp_path: Path) -> None:
    log, limit = tmp_path / "worker.log", 10_000
    code = "import sys\nfor i in range(20000): print(f'line {i:06d}', flush=True)"
    with log.open("ab") as output, subprocess.Popen([sys.executable, "-c", code], stdout=output) as writer:
        largest = 0
        while writer.poll() is None:
            largest = max(largest, log.stat().st_size)
            trim_log(log, limit)
    trim_log(log, limit)
    lines = log.read_text().splitlines()
    assert largest > limit
    assert log.stat().st_size <= limit
    assert "(older lines were removed)" in lines
    # A line that was written while the log was cut may be lost, or be there in part.
    numbers = [int(line.removeprefix("line ")) for line in lines if re.fullmatch(r"line \d{6}", line)]
    assert len(numbers) > len(lines) / 2
    assert numbers == sorted(numbers)
