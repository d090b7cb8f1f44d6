"""Settings from the environment: values, defaults, messages, and the page that lists them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from docs.environment_reference import PAGE, page
from hetrain.public.errors import UsageError
from hetrain.public.model.files import cache_directory
from hetrain.public.protocol.registration import ShardRange
from hetrain.public.settings import ClientSettings, Settings, WorkerSettings, variable
from worker_gpu.weights.store import served_models

SECRET = "p4ssw0rd"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the variables is set."""
    for name in [name for name in os.environ if name.startswith("HETRAIN_")]:
        monkeypatch.delenv(name)


def test_the_page_of_variables_is_that_of_the_fields() -> None:
    assert PAGE.read_text() == page(), "run: python -m docs.environment_reference"
    fields = ClientSettings.model_fields | WorkerSettings.model_fields
    assert all(f"`{variable(name)}`" in page() for name in fields)
    assert all(field.description for field in fields.values())


def test_defaults() -> None:
    worker, client = WorkerSettings(), ClientSettings()
    assert worker.broker_url == "redis://localhost:6379/0"
    assert (worker.device, worker.worker_concurrency, worker.shards, worker.weights_bytes) == (None,) * 4
    assert worker.ready_fd is None
    assert served_models() == {"smollm2-135m": "smollm2-135m"}
    assert (client.broker_url, client.tenant) == (None, "")
    assert cache_directory() == Path.home() / ".cache" / "hetrain" == worker.cache


def test_what_is_empty_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = WorkerSettings(), ClientSettings()
    for name in ClientSettings.model_fields | WorkerSettings.model_fields:
        monkeypatch.setenv(variable(name), " ")
    assert (WorkerSettings(), ClientSettings()) == defaults


def test_values_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = {
        "CACHE": str(tmp_path),
        "BROKER_URL": "unix:///run/broker",
        "DEVICE": "cpu",
        "WORKER_CONCURRENCY": "3",
        "SHARDS": " 3/4 ",
        "WEIGHTS_BYTES": "1.5 GiB",
        "READY_FD": "5",
        "TENANT": "no worker's business",
    }
    for name, value in given.items():
        monkeypatch.setenv(f"HETRAIN_{name}", value)
    worker = WorkerSettings()
    assert worker.cache == tmp_path == cache_directory()
    assert (worker.broker_url, worker.device) == ("unix:///run/broker", "cpu")
    assert (worker.worker_concurrency, worker.shards) == (3, ShardRange(3, 3, 4))
    assert (worker.weights_bytes, worker.ready_fd) == (3 << 29, 5)
    with pytest.raises(ValidationError, match="frozen"):
        worker.device = "cuda"
    assert WorkerSettings(device="meta").device == "meta"  # an argument wins


def test_models_are_names_paths_and_labels_or_a_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "odd, name=x").mkdir()
    (tmp_path / "plain").mkdir()
    for text, models in (
        (f"org/model, llama-3=/models/any,,{tmp_path}/plain", ["org/model", "llama-3", "plain"]),
        (f'["{tmp_path}/odd, name=x"]', ["odd-name-x"]),
        ("[]", []),
    ):
        monkeypatch.setenv("HETRAIN_MODELS", text)
        assert list(served_models()) == models
    assert WorkerSettings(models="a=/b").models == (("a", "/b"),)


@pytest.mark.parametrize(
    ("kind", "field", "value", "what", "hint"),
    [
        (WorkerSettings, "models", '["a"', "no list of models", "such as"),
        (WorkerSettings, "shards", "8-7/32", "shards 8-7/32 make no sense", "such as 0-7/32"),
        (WorkerSettings, "weights_bytes", "much", "'much' is no number of bytes", "20GB"),
        (WorkerSettings, "worker_concurrency", "0", "'0' is no positive whole number", "write a number"),
        (WorkerSettings, "worker_concurrency", "2.5", "'2.5' is no positive whole number", "write a number"),
        (WorkerSettings, "ready_fd", "-1", "'-1' is no file descriptor", "supervisors"),
        (ClientSettings, "tenant", "0" * 15, "is no tenant", "16 lower-case hexadecimal digits"),
        (WorkerSettings, "broker_url", f"http://:{SECRET}@host", "unknown scheme", "percent-encode"),
        (ClientSettings, "broker_url", f"redis://:{SECRET}@host:x/0", "cannot be parsed", "percent-encode"),
    ],
)
def test_a_bad_value_names_its_variable_and_what_to_write(
    monkeypatch: pytest.MonkeyPatch, kind: type[Settings], field: str, value: str, what: str, hint: str
) -> None:
    monkeypatch.setenv(variable(field), value)
    with pytest.raises(UsageError, match=what) as caught:
        kind()
    assert caught.value.where.startswith(variable(field))
    assert hint in caught.value.hint
    assert SECRET not in str(caught.value)


def test_settings_never_show_the_broker_s_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETRAIN_BROKER_URL", f"redis://:{SECRET}@host:1/0")
    assert SECRET not in repr(WorkerSettings()) + repr(ClientSettings())
