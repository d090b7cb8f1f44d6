"""`docker/`: what can be checked of images and of the compose file without a Docker engine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from compose_spec import PyCompose

from hetrain.public.broker.connection import client, connection_pool
from hetrain.public.errors import BrokerError, BrokerUnreachable
from tasks.supervisor.server import private_directory
from tasks.supervisor.worker_process import stop, tie_to_parent
from tests.harness.processes import broker_server
from tests.harness.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
IMAGES = ("worker", "client")
# Fields of the Compose Specification in which the variables may stand; its parser knows no variables.
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


def composed(**variables: str) -> dict[str, Any]:
    """The compose file with its variables filled in and its aliases and merges resolved."""
    text = (DOCKER / "compose.yaml").read_text()
    filled = VARIABLE.sub(lambda match: variables.get(match[1], match[2]), text)
    assert "${" not in filled
    found: dict[str, Any] = yaml.safe_load(filled)
    return found


def instructions(image: str) -> list[tuple[str, str]]:
    """All instructions of a Dockerfile with their arguments, continued lines joined."""
    text = (DOCKER / f"{image}.Dockerfile").read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in text.splitlines() if line]


def test_the_compose_file_is_one_and_its_references_lead_somewhere() -> None:
    plain = {key: value for key, value in composed().items() if not key.startswith("x-")}
    compose = PyCompose.from_yaml(yaml.safe_dump(plain))
    compose.validate()
    assert set(compose.service_names()) == {"broker", "worker-cpu", "worker-gpu", "flower", "client"}
    with pytest.raises(ValueError, match="portz"):
        PyCompose.from_yaml(yaml.safe_dump(plain | {"services": {"a": {"image": "b", "portz": []}}}))
    text = (DOCKER / "compose.yaml").read_text()
    explained = set(re.findall(r"^#   (HETRAIN_\w+)", text, flags=re.MULTILINE))
    assert {name for name, _ in VARIABLE.findall(text)} == explained
    for service in plain["services"].values():
        if build := service.get("build"):
            assert (DOCKER / build["context"] / build["dockerfile"]).is_file()


def test_every_service_is_closed_and_looked_after() -> None:
    services = composed()["services"]
    own = {f"hetrain-worker:{kind}": "worker" for kind in ("cpu", "cuda")} | {"hetrain:latest": "client"}
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service["user"].split(":")[0] != "0", name
        image = own.get(service["image"])
        assert "healthcheck" in service or any(kind == "HEALTHCHECK" for kind, _ in instructions(str(image)))
        # Passwords come in files that docker/prepare.sh made, and in nothing else.
        assert not re.search(r"password|requirepass|:[^/]*@", str(service), flags=re.IGNORECASE), name
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {"broker": ["127.0.0.1:6380:6380"], "flower": ["127.0.0.1:5555:5555"]}
    (device,) = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert composed(HETRAIN_WORKERS="3")["services"]["worker-cpu"]["deploy"]["replicas"] == 3
    assert services["worker-cpu"]["profiles"] == ["cpu"]
    assert services["worker-gpu"]["profiles"] == ["gpu"]
    assert "operator.env" in services["flower"]["env_file"][0]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="docker/prepare.sh calls openssl")
def test_prepare_makes_what_the_compose_file_mounts(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    prepare = [DOCKER / "prepare.sh", folder, "broker.example,broker,127.0.0.1"]
    subprocess.run([*prepare, "alice"], check=True)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    file = composed(HETRAIN_SECRETS=str(folder))
    mounted = [secret["file"] for secret in file["secrets"].values()]
    mounted += [path for service in file["services"].values() for path in service.get("env_file", ())]
    assert all(Path(path).is_file() for path in mounted)
    assert folder.stat().st_mode & 0o077 == 0
    assert (folder / "ca.key").stat().st_mode & 0o077 == 0
    # More clients, later: what is there stays.
    subprocess.run([*prepare, "bob", "alice"], check=True)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(after) - set(before) == {"bob.env"}
    assert {name for name in before if before[name] != after[name]} == {"users.acl"}
    assert after["users.acl"].startswith(before["users.acl"])
    ca, certificate = folder / "ca.crt", folder / "server.crt"
    for name in ("-verify_hostname", "broker.example"), ("-verify_ip", "127.0.0.1"):
        subprocess.run(["openssl", "verify", "-CAfile", ca, *name, certificate], check=True)
    for bad in ("worker", "Alice", "a b", "../x", ""):
        assert subprocess.run([*prepare, bad], capture_output=True).returncode == 2


@pytest.mark.skipif(shutil.which("openssl") is None, reason="docker/prepare.sh calls openssl")
def test_the_brokers_command_starts_a_closed_server(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    subprocess.run([DOCKER / "prepare.sh", secrets, "broker", "alice"], check=True)
    command = composed()["services"]["broker"]["command"]
    # This server is built without TLS.
    pairs = [
        pair for pair in zip(command[1::2], command[2::2], strict=True) if not pair[0].startswith("--tls-")
    ]
    assert len(pairs) == len(command) // 2 - 5
    with broker_server() as embedded:
        program = psutil.Process(embedded.process.pid).exe()
    with ExitStack() as stack:
        directory = private_directory()
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        options = [text.replace("/run/secrets", str(secrets)) for pair in pairs for text in pair]
        socket = directory / "broker.sock"
        log = stack.enter_context((directory / "log").open("wb"))
        server = subprocess.Popen(
            [program, *options, "--unixsocket", str(socket)],
            cwd=directory,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=tie_to_parent(),
        )
        stack.callback(stop, [server])
        password = re.search(r"operator:([0-9a-f]+)@", (secrets / "operator.env").read_text())
        assert password is not None
        operator = client(connection_pool(f"unix://operator:{password[1]}@{socket}"))
        eventually(socket.exists, 15, what="the broker's socket")
        info = operator.info()
        assert info["maxmemory"] == 4 << 30
        assert info["maxmemory_policy"] == "noeviction"
        assert info["aof_enabled"] == 0
        from hetrain.public.broker.connection import ping

        with pytest.raises(BrokerError):
            ping(f"unix://{socket}")
        with pytest.raises(BrokerUnreachable, match="credentials"):
            ping(f"unix://alice:wrong@{socket}")


@pytest.mark.parametrize("image", IMAGES)
def test_dockerfiles_pass_the_linter(image: str) -> None:
    linter = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([linter, DOCKER / f"{image}.Dockerfile"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("image", IMAGES)
def test_images_hold_what_they_need_and_run_without_privileges(image: str) -> None:
    found = instructions(image)
    users = [index for index, (kind, _) in enumerate(found) if kind == "USER"]
    assert found[users[-1]][1] == "1000:1000"
    assert all(
        kind in {"WORKDIR", "ENV", "HEALTHCHECK", "ENTRYPOINT", "CMD"} for kind, _ in found[users[-1] + 1 :]
    )
    allowed = {
        line.removeprefix("!")
        for line in (DOCKER / f"{image}.Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    sources = {source for kind, rest in found if kind == "COPY" for source in rest.split()[:-1]}
    assert sources == allowed
    assert all((ROOT / source).exists() for source in sources)
    assert not any("tests" in source for source in sources)
    named = {name for kind, rest in found if kind in {"ARG", "ENV"} for name in re.findall(r"(\w+)=", rest)}
    assert not any(word in name for name in named for word in ("PASSWORD", "SECRET", "BROKER", "TOKEN"))


def test_the_documented_rules_are_those_of_the_template() -> None:
    template = (DOCKER / "users.acl.template").read_text()
    joined = re.sub(r"\n {4}", " ", template)
    (rule,) = re.findall(r"^user CLIENT (.*)$", joined, flags=re.MULTILINE)
    rule = rule.replace("#SHA256", ">PASSWORD").replace("TENANT", "0123456789abcdef").replace("LANE", "0")
    assert f"ACL SETUSER carol {rule}\n" in (ROOT / "docs" / "deployment.md").read_text()
