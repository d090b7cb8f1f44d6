"""Client, broker and two workers on hosts of their own, with TLS; one worker is cut off and comes back.

The hosts are network namespaces where this process may make them. Elsewhere they are addresses of the
loopback device, each with a way to the broker of its own that can be blocked.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import monotonic, sleep
from typing import IO, Protocol

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from hetrain.public.broker.connection import parse_broker_url
from hetrain.public.errors import BrokerError
from tasks.supervisor.worker_process import stop, tie_to_parent
from tests.harness.processes import HANDBOOK, HETRAIN, broker_server
from tests.harness.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
PROXY = (sys.executable, str(ROOT / "tests" / "harness" / "tls_proxy.py"))
HOSTS = ("client", "worker-1", "worker-2")
UPDATES = 16
CUT_S = 10.0

# As `hetrain` does before anything else, without what it imports.
PING = """
import os, sys
from hetrain.public.broker.connection import ping
from hetrain.public.errors import HetrainError
try:
    ping(os.environ["HETRAIN_BROKER_URL"])
except HetrainError as error:
    print(error)
    sys.exit(error.exit_code)
"""

Spawn = Callable[..., "subprocess.Popen[bytes]"]


class Hosts(Protocol):
    """Hosts that reach a broker, each at an address of `addresses`."""

    def on(self, host: str) -> Sequence[str]:
        """What to put before a command that runs on `host`."""

    def broker(self, host: str) -> str:
        """HOST:PORT of the broker, for `host`."""

    def disconnect(self, host: str) -> None:
        """From now on all packets between `host` and the others are lost; no connection is reset."""

    def reconnect(self, host: str) -> None:
        """Ends what `disconnect` began."""


class Namespaces:
    """Network namespaces on a bridge, which has one of its own: nothing else of this machine changes."""

    PORT = 6380

    def __init__(self, stack: ExitStack, proxy: Callable[[Sequence[str], str, int], None]) -> None:
        self._prefix = f"hetrain{os.getpid()}-"
        self._add("switch", stack)
        self._ip("switch", "link add name bridge type bridge")
        self._ip("switch", "link set dev bridge up")
        for index, name in enumerate(("broker", *HOSTS), start=1):
            self._add(name, stack)
            peer = f"netns {self._prefix}{name}"
            self._ip("switch", f"link add name {name} type veth peer name eth0 {peer}")
            self._ip("switch", f"link set dev {name} master bridge up")
            self._ip(name, f"addr add 10.77.0.{index}/24 dev eth0")
            self._ip(name, "link set dev eth0 up")
            self._ip(name, "link set dev lo up")
        proxy(self.on("broker"), "10.77.0.1", self.PORT)

    def on(self, host: str) -> Sequence[str]:
        return ("ip", "netns", "exec", self._prefix + host)

    def broker(self, host: str) -> str:
        return f"10.77.0.1:{self.PORT}"

    def disconnect(self, host: str) -> None:
        # Its cable stays in, but leads nowhere: packets vanish, no connection is reset.
        self._ip("switch", f"link set dev {host} nomaster")

    def reconnect(self, host: str) -> None:
        self._ip("switch", f"link set dev {host} master bridge")

    def _add(self, name: str, stack: ExitStack) -> None:
        subprocess.run(["ip", "netns", "add", self._prefix + name], check=True)
        stack.callback(subprocess.run, ["ip", "netns", "del", self._prefix + name], check=False)

    def _ip(self, name: str, command: str) -> None:
        subprocess.run(["ip", "-n", self._prefix + name, *command.split()], check=True)

    @staticmethod
    def can_be_made() -> bool:
        """Whether this process may make namespaces, links and a bridge."""
        if os.geteuid() != 0 or shutil.which("ip") is None:
            return False
        name = f"hetrain{os.getpid()}-trial"
        if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
            return False
        try:
            made = [
                subprocess.run(
                    ["ip", "-n", name, "link", "add", *link.split()], capture_output=True
                ).returncode
                for link in ("name b type bridge", "name v type veth peer name w")
            ]
        finally:
            subprocess.run(["ip", "netns", "del", name], check=False)
        return not any(made)


class Loopback:
    """Addresses of the loopback device. Each host has its own TLS end, which is halted to cut it off."""

    def __init__(self, stack: ExitStack, proxy: Callable[[Sequence[str], str, int], subprocess.Popen[bytes]]):
        self._addresses: dict[str, tuple[str, int]] = {}
        self._proxies: dict[str, subprocess.Popen[bytes]] = {}
        for index, name in enumerate(HOSTS, start=2):
            with socket.create_server((f"127.0.0.{index}", 0)) as free:
                self._addresses[name] = free.getsockname()[:2]
            self._proxies[name] = proxy((), *self._addresses[name])
            stack.callback(self.reconnect, name)  # what is halted cannot be ended politely

    def on(self, host: str) -> Sequence[str]:
        return ()

    def broker(self, host: str) -> str:
        return "{}:{}".format(*self._addresses[host])

    def disconnect(self, host: str) -> None:
        self._proxies[host].send_signal(signal.SIGSTOP)

    def reconnect(self, host: str) -> None:
        self._proxies[host].send_signal(signal.SIGCONT)


KINDS = [Namespaces] if Namespaces.can_be_made() else [Loopback]
if os.environ.get("HETRAIN_TEST_LOOPBACK"):
    KINDS = [Loopback]


class Authority:
    """A certificate authority that lives for a test."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir()
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, directory.name)])
        others = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment")
        usage = dict.fromkeys((*others, "key_agreement", "encipher_only", "decipher_only"), False)
        certificate = (
            self._begin(self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.KeyUsage(**usage, key_cert_sign=True, crl_sign=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.path = directory / "ca.crt"
        self.path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, addresses: Sequence[str]) -> tuple[str, str]:
        """A certificate for servers at `addresses` and its key: two files."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName(
            [x509.IPAddress(ipaddress.ip_address(text)) for text in addresses]
        )
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        certificate = (
            self._begin(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "broker")]), key.public_key())
            .add_extension(names, critical=False)
            .add_extension(authority, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        paths = self._directory / "server.crt", self._directory / "server.key"
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        paths[1].write_bytes(key.private_bytes(*pem))
        return str(paths[0]), str(paths[1])

    def _begin(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
        )


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts processes that end with the test."""
    with ExitStack() as stack:

        def start(
            command: Sequence[object], output: IO[bytes], environment: Mapping[str, str] | None = None
        ) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=ROOT,
                env={**clean_environment(), **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=tie_to_parent(),
            )
            stack.callback(stop, [process], 0.5)
            return process

        yield start


def clean_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HETRAIN_")}
    # Three processes compute on this machine's cores.
    return kept | {"OMP_NUM_THREADS": "1"}


def submit(model: Path, output: Path, *more: object) -> list[object]:
    place = ("--model-name-or-path", model, "--output-dir", output, "--quiet")
    what = ("--engine", "clear", "--batch-tokens", 128, "--micro-batch-tokens", 64, "--max-length", 32)
    return [*HETRAIN, "submit", HANDBOOK, *place, *what, *more]


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_is_cut_off_and_comes_back(
    kind: type, tiny_llama: Path, tmp_path: Path, spawn: Spawn
) -> None:
    ours, others = Authority(tmp_path / "ours"), Authority(tmp_path / "others")
    certificate = ours.issue(["10.77.0.1", *(f"127.0.0.{index}" for index in range(2, 5))])
    logs = {name: tmp_path / f"{name}.log" for name in (*HOSTS, "proxy", "undisturbed", "refused")}
    with ExitStack() as stack:
        files = {name: stack.enter_context(path.open("wb")) for name, path in logs.items()}
        broker = stack.enter_context(broker_server())
        path, login = parse_broker_url(broker.url).socket, parse_broker_url(broker.url).credentials

        def proxy(prefix: Sequence[str], address: str, port: int) -> subprocess.Popen[bytes]:
            return spawn([*prefix, *PROXY, *certificate, address, port, path], files["proxy"])

        hosts: Hosts = kind(stack, proxy)

        def start(host: str, command: Sequence[object], log: str = "", trusted: Path = ours.path):  # type: ignore[no-untyped-def]
            url = f"rediss://{login}@{hosts.broker(host)}/0?ssl_ca_certs={trusted}"
            environment = {"HETRAIN_BROKER_URL": url, "HETRAIN_MODELS": json.dumps([str(tiny_llama)])}
            return spawn([*hosts.on(host), *command], files[log or host], environment)

        def has(host: str, text: str) -> bool:
            return text in logs[host].read_text(errors="replace")

        serve = (sys.executable, "-m", "celery", "-A", "tasks", "worker", "-Q", "gpu", "-l", "INFO", "-n")
        workers = {name: start(name, [*serve, f"{name}@{name}"]) for name in HOSTS[1:]}
        # An undisturbed run, on this host alone.
        undisturbed = spawn(
            submit(tiny_llama, tmp_path / "undisturbed", "--max-steps", UPDATES), files["undisturbed"]
        )
        refused = start("client", [sys.executable, "-c", PING], "refused", trusted=others.path)
        for name in workers:
            eventually(lambda name=name: has(name, "ready."), what=f"{name} is ready")  # type: ignore[misc]

        assert refused.wait(60) == BrokerError.exit_code
        assert has("refused", "certificate"), logs["refused"].read_text()
        output = tmp_path / "cut"
        job = start("client", submit(tiny_llama, output, "--max-steps", UPDATES))
        metrics = output / "metrics.jsonl"

        def updates() -> int:
            return len(metrics.read_text().splitlines()) // 2 if metrics.is_file() else 0

        eventually(lambda: updates() >= 2, what="two updates")
        hosts.disconnect("worker-2")
        end = monotonic() + CUT_S
        eventually(lambda: updates() >= UPDATES - 4 or monotonic() > end)
        if halted := monotonic() < end:
            os.killpg(job.pid, signal.SIGSTOP)  # else nothing would be left for the worker that comes back
            sleep(max(0.0, end - monotonic()))
        hosts.reconnect("worker-2")
        # From here on the job has no other worker.
        stop([workers["worker-1"]], 0.2)
        served = logs["worker-2"].read_text().count("succeeded")
        if halted:
            os.killpg(job.pid, signal.SIGCONT)
        assert job.wait(90) == 0, logs["client"].read_text()
        assert undisturbed.wait(60) == 0, logs["undisturbed"].read_text()
        assert logs["worker-2"].read_text().count("succeeded") > served
        steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
        assert sorted(steps) == sorted([*range(1, UPDATES + 1)] * 2)
        adapters = [
            (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("undisturbed", "cut")
        ]
        assert adapters[0] == adapters[1]
