"""Nothing readable leaves the client: every byte to and from the broker is recorded and searched."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import torch

from hetrain.config import LoraConfig, TrainingConfig
from hetrain.data.packing import micro_batches
from hetrain.data.tokenization import read_rows
from hetrain.nn.lora import adapter_parameters, add_adapter
from hetrain.nn.replica import Replica
from hetrain.nn.split import split_model
from hetrain.public.lattice.bounds import operand_bound
from hetrain.public.model.files import resolve
from hetrain.public.model.quantization import Scales
from hetrain.public.protocol.plan import Group
from hetrain.public.protocol.product import Product, ProductKey
from hetrain.secret.activation_quantization import quantize_operand
from hetrain.secret.engine import JobOptions, Sealer, client_engine
from hetrain.secret.engines.clear import digit_planes
from hetrain.secret.engines.rlwe.hints import HintStore
from hetrain.secret.verification.job import Verification, kept_rows
from hetrain.secret.verification.rows import CheckRows
from hetrain.train.hints import ignore_progress, make_hints
from hetrain.train.session import open_base
from hetrain.train.step import run_step
from hetrain.train.updater import Updater
from hetrain.transport.celery_channel import CeleryChannel
from tasks.supervisor.server import private_directory, start_server, stop

CANARY = "the canary sings at four o'clock behind the blue door"
WINDOW = 16
REPO = Path(__file__).resolve().parents[2]


class Wiretap:
    """A relay between a Unix socket and the broker's that keeps every byte of every connection."""

    def __init__(self, path: Path, target: Path) -> None:
        self._target = str(target)
        self._streams: list[bytearray] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def recorded(self) -> bytes:
        """All streams, one after the other."""
        return b"\0\0\0\0".join(bytes(stream) for stream in self._streams)

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            far.connect(self._target)
            for source, sink in ((near, far), (far, near)):
                stream = bytearray()
                self._streams.append(stream)
                threading.Thread(target=self._relay, args=(source, sink, stream), daemon=True).start()

    @staticmethod
    def _relay(source: socket.socket, sink: socket.socket, stream: bytearray) -> None:
        try:
            while data := source.recv(1 << 16):
                stream += data
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


class RecordingSealer:
    """A sealer that remembers every operand it seals and every product it opens."""

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer
        self.setup = sealer.setup
        self.secrets: list[torch.Tensor] = []

    def for_micro_batch(self) -> RecordingSealer:
        return self

    def seal(self, x: torch.Tensor, product: Product, channels: Scales):  # type: ignore[no-untyped-def]
        sealed = self._sealer.seal(x, product, channels)
        operand = quantize_operand(x, operand_bound(product.norms, product.n), columns=channels.inputs)
        self.secrets += [x.detach().float(), operand.values, operand.scales]
        self.secrets += digit_planes(operand.values).unbind()
        opening, secrets = sealed.opening, self.secrets

        class Recording:
            check = staticmethod(opening.check)

            def open(self):  # type: ignore[no-untyped-def]
                y = opening.open()
                secrets.append(y)
                secrets.append((y / operand.scales[:, None]).round().to(torch.int32))
                return y

        return type("Sealed", (), {"operand": sealed.operand, "opening": Recording()})()

    def windows(self) -> Iterator[bytes]:
        """Byte windows of all that must stay secret: by rows and by columns, as float32, half and int32."""
        for tensor in self.secrets:
            for laid_out in (tensor, tensor.t()) if tensor.dim() == 2 else (tensor,):
                forms = [laid_out.contiguous()]
                if laid_out.is_floating_point():
                    forms += [forms[0].half(), forms[0].bfloat16().view(torch.int16)]
                for form in forms:
                    data = form.numpy().tobytes()
                    for start in range(0, len(data) - WINDOW, max(len(data) // 8, WINDOW) // 4 * 4):
                        window = data[start : start + WINDOW]
                        if len(set(window)) > WINDOW // 2:  # runs of zeros are everywhere
                            yield window


@contextmanager
def tapped_broker(model: Path, log: Path) -> Iterator[tuple[str, Wiretap]]:
    """A broker behind a wiretap, with a worker started as a user would start one."""
    with ExitStack() as stack:
        directory = private_directory()
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        output = stack.enter_context(log.open("wb"))
        server, url = start_server(directory, output)
        stack.callback(stop, [server])
        tap = Wiretap(directory / "tap.sock", directory / "broker.sock")
        stack.callback(tap.close)
        url = url.replace("broker.sock", "tap.sock")
        worker = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "tasks", "worker", "-Q", "gpu"],
            cwd=REPO,
            env=os.environ | {"HETRAIN_BROKER_URL": url, "HETRAIN_MODELS": str(model)},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        stack.callback(stop, [worker])
        yield url, tap


def run_canary_step(model: Path, engine: str, scratch: Path) -> tuple[bytes, RecordingSealer]:
    """One forward and backward over canary rows: all that was recorded and logged, and what was secret."""
    base = open_base(str(model))
    data = scratch / "rows.jsonl"
    data.write_text("".join(f'{{"text": "{CANARY}, said {name}"}}\n' for name in ("ann", "bob", "cy")))
    rows = read_rows(data, base.tokenizer, 64)
    (batch,) = micro_batches(rows, [range(len(rows))])
    log = scratch / "worker.log"
    with tapped_broker(model, log) as (url, tap):
        channel = CeleryChannel(url)
        try:
            matrices: dict[str, torch.Tensor] = {}
            kept: dict[ProductKey, CheckRows] = {}

            def take(group: Group, matrix: torch.Tensor) -> None:
                matrices[group.name] = matrix
                kept.update(kept_rows(group, matrix))

            def weights(product: Product) -> torch.Tensor:
                matrix = matrices[product.group.name]
                return matrix if product.direction == "forward" else matrix.t()

            split = split_model(resolve(str(model)), on_matrix=take)
            plan, hints = split.plan, HintStore(scratch / "hints")
            options = JobOptions(Verification(kept, weights), hints=hints)
            recorder = RecordingSealer(client_engine(engine).open(plan, options))
            recorder.secrets += [form for rows in kept.values() for form in (rows.values, rows.image)]
            channel.prepare(plan.model, engine, plan.to_bytes(), plan.digest)
            if engine == "rlwe":
                make_hints(hints, plan, channel, weights, ignore_progress)
            adapted = add_adapter(split, LoraConfig(r=2, alpha=4), 0)
            replica = Replica(split, adapted, channel, recorder)
            updater = Updater(adapter_parameters(adapted), TrainingConfig(), 1)
            result = run_step(replica, batch, updater.snapshot(), 0)
            assert result.summed_loss > 0
            ids = batch.tokens
            recorder.secrets += [ids, ids.to(torch.int32)]
        finally:
            channel.close()
        recorded = tap.recorded()
    return recorded + log.read_bytes(), recorder


@pytest.mark.parametrize(("engine", "readable"), [("rlwe", False), ("clear", True)])
def test_what_leaves_the_client(tiny_llama: Path, tmp_path: Path, engine: str, readable: bool) -> None:
    """With `rlwe` nothing is found; with `clear` the very same search finds plenty, so it can find."""
    recorded, recorder = run_canary_step(tiny_llama, engine, tmp_path)
    windows = list(recorder.windows())
    assert len(windows) > 500
    assert b"hetrain.evaluate" in recorded, "the wiretap recorded no task"
    found = sum(window in recorded for window in windows)
    assert (found > 20) if readable else (found == 0)
    assert CANARY.encode() not in recorded
    assert CANARY.split()[1].encode() not in recorded
