"""A data set of the hub, over HTTP as the hub has it, from the command line."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.harness.hub import hub_with
from tests.harness.processes import HETRAIN

FILES = {
    "README.md": b"---\nlicense: mit\n---\n",
    "train.jsonl": b'{"text": "Herrings sing."}\n{"text": "At dusk.", "id": 4}\n',
    "test.jsonl": b'{"text": ""}\n',
}


def call(home: Path, endpoint: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    command = [*HETRAIN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_a_data_set_of_the_hub_is_read_by_its_name(tiny_llama: Path, tmp_path: Path) -> None:
    with hub_with("owner/name", FILES) as endpoint:
        found = call(tmp_path, endpoint, "plan", tiny_llama, "--dataset", "owner/name", "--json")
        assert found.returncode == 0, found.stderr
        assert json.loads(found.stdout)["course"]["rows"] == 2
        # Evaluation reads the split to test on.
        found = call(tmp_path, endpoint, "eval", "owner/name", "-m", tiny_llama)
        assert found.returncode == 3
        assert "error: owner/name:1: field 'text' is empty" in found.stderr
        found = call(tmp_path, endpoint, "eval", "owner/name", "--dataset-test-split", "dev")
        assert found.returncode == 3
        assert "'dev'" in found.stderr or '"dev"' in found.stderr
        found = call(tmp_path, endpoint, "submit", "owner/another")
        assert found.returncode == 3
        assert "error: owner/another: there is no such file, and on the hub it cannot be read" in found.stderr


def test_a_data_set_that_names_files_of_this_machine_is_refused(tmp_path: Path) -> None:
    private = tmp_path / "private.jsonl"
    private.write_text('{"text": "the safe\'s code"}\n')
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {private}\n---\n"
    with hub_with("owner/name", {**FILES, "README.md": card.encode()}) as endpoint:
        found = call(tmp_path / "home", endpoint, "submit", "owner/name")
        assert found.returncode == 3
        # Refused by datasets, or by us where an older one allows it.
        assert "relative paths" in found.stderr or "not its own" in found.stderr
        assert "error: owner/name: " in found.stderr
