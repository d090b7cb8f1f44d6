"""The engines under test: hetrain's own and Zama's library for the same product, behind one interface."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Protocol

import numpy as np
import torch

from benchmarks.workloads import Workload
from hetrain.public.concrete.circuits import compile_circuit, tile
from hetrain.public.concrete.package import load_fhe
from hetrain.public.errors import UsageError
from hetrain.public.lattice.parameters import SLOTS, parameters_for
from hetrain.public.lattice.result_format import largest_operand
from hetrain.public.protocol.messages import EvaluateTask
from hetrain.public.protocol.product import Product
from hetrain.secret.activation_quantization import dequantize_result, quantize_operand
from hetrain.secret.engine import JobOptions, client_engine
from hetrain.secret.engines.concrete import DEFAULT_BITS
from hetrain.secret.engines.rlwe.hints import HintStore, sketches_of
from hetrain.transport.in_process import InProcessChannel
from worker_gpu.device import Compute
from worker_gpu.service import Service
from worker_gpu.weights.store import WeightStore

PEER, PEER_VERSION = "concrete-ml-extensions", "0.2.0"
EIGHT_BITS = (1 << (DEFAULT_BITS - 1)) - 1


@dataclass(frozen=True)
class Keys:
    """Bytes of a client's secret key and of the evaluation keys that workers get; how long both serve."""

    secret_bytes: int
    evaluation_bytes: int
    serve: str


@dataclass(frozen=True)
class Measurement:
    """One product on its whole way: seconds, bytes, and y float32 [T, N]."""

    encrypt_s: float
    worker_s: float
    worker_cpu_s: float
    decrypt_s: float
    bytes_up: int
    bytes_down: int
    y: torch.Tensor


class EngineUnderTest(Protocol):
    """An engine with its keys drawn, its circuits compiled and its matrix loaded."""

    keys: Keys

    def x_max(self, tokens: int) -> int:
        """The largest entry of a quantised operand."""
        ...

    def multiply(self, x: torch.Tensor) -> Measurement:
        """X·Qᵀ for float32 [T, K]: encrypted, evaluated, decrypted."""
        ...


class Clock:
    """Seconds and processor seconds since it was made or last read."""

    def __init__(self) -> None:
        self._begun = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Reads it and starts it again."""
        now, begun = (time.perf_counter(), time.process_time()), self._begun
        self._begun = now
        return now[0] - begun[0], now[1] - begun[1]


def _no_options(workload: Workload) -> JobOptions:
    return JobOptions()


@dataclass(frozen=True)
class Traits:
    """An engine's properties that a measurement needs.

    Attributes:
        engine: its name in hetrain's table.
        keys: the sizes of its keys.
        x_max: its largest operand, from the number of tokens and max_j ‖Q_j‖₁.
        options: of the job.
    """

    engine: str
    keys: Callable[[Workload], Keys]
    x_max: Callable[[int, int], int]
    options: Callable[[Workload], JobOptions] = _no_options


def _rlwe_keys(workload: Workload) -> Keys:
    return Keys(parameters_for(SLOTS).dimension, 0, "one ciphertext matrix")  # ternary, a byte each


def _rlwe_x_max(tokens: int, max_l1: int) -> int:
    return largest_operand(parameters_for(tokens), max_l1)


def _concrete_keys(workload: Workload) -> Keys:
    n, k = workload.matrix.shape
    holder = compile_circuit(tile(k, n, EIGHT_BITS)).new_keys()
    return Keys(len(holder.keys.serialize()), len(holder.evaluation_keys.serialize()), "one job")


def _hints(workload: Workload) -> JobOptions:
    """A store that the first product fills."""
    sketches = sketches_of(workload.group, workload.matrix)
    return JobOptions(hints=HintStore(workload.plan, sketches, Path(tempfile.gettempdir())))


TRAITS: Mapping[str, Traits] = MappingProxyType(
    {
        "rlwe": Traits("rlwe", _rlwe_keys, _rlwe_x_max),
        "rlwe-hints": Traits("rlwe", _rlwe_keys, _rlwe_x_max, _hints),
        "clear": Traits("clear", lambda workload: Keys(0, 0, ""), _rlwe_x_max),
        "concrete": Traits("concrete", _concrete_keys, lambda tokens, max_l1: EIGHT_BITS),
    }
)


class HetrainEngine:
    """An engine of hetrain: its client half, and a worker's service, through the queue's messages."""

    def __init__(self, name: str, workload: Workload, compute: Compute) -> None:
        traits = TRAITS[name]
        self._traits, self._product = traits, Product(workload.group, "forward")
        plan = workload.plan
        self._load_plan = plan.to_bytes
        self._service = Service(compute, WeightStore(compute.device, {plan.model: str(workload.directory)}))
        self._sealer = client_engine(traits.engine).open(plan, traits.options(workload))
        self._channel = InProcessChannel(
            self._evaluate, lambda task, data: self._service.prepare(task, lambda: data)
        )
        self._channel.prepare(plan.model, traits.engine, plan.to_bytes(), plan.digest, self._sealer.setup)
        self._worker = (0.0, 0.0)
        self.keys = traits.keys(workload)
        self.multiply(workload.x[:1])  # warm; and the hints, if any, are there

    def x_max(self, tokens: int) -> int:
        """See `EngineUnderTest.x_max`."""
        return self._traits.x_max(tokens, self._product.max_l1)

    def multiply(self, x: torch.Tensor) -> Measurement:
        """See `EngineUnderTest.multiply`."""
        clock = Clock()
        sealed = self._sealer.seal(x, self._product)
        encrypt_s, _ = clock.read()
        reply = self._channel.multiply(self._product, sealed.operand, sealed.opening.check)
        clock.read()
        y = sealed.opening.open(reply.parts)
        decrypt_s, _ = clock.read()
        return Measurement(encrypt_s, *self._worker, decrypt_s, reply.bytes_up, reply.bytes_down, y)

    def _evaluate(self, task: EvaluateTask, payload: memoryview) -> list[memoryview]:
        clock = Clock()
        parts = self._service.evaluate(task, self._load_plan, payload)
        self._worker = clock.read()
        return parts


class Peer:
    """concrete-ml-extensions: activations of 8 bits, one GLWE ciphertext for up to 2048 inputs of a token."""

    def __init__(self, workload: Workload) -> None:
        self._library = _load_peer()
        self._columns = workload.group.out_features
        text = self._library.default_params()
        self._degree = int(json.loads(text)["polynomial_size"])
        self._parameters = self._library.MatmulCryptoParameters.deserialize(text)
        self._secret, self._compression = self._library.create_private_key(self._parameters)
        # It takes signed numbers as their two's complement.
        self._weights = np.ascontiguousarray(workload.matrix.t().to(torch.int64).numpy()).view(np.uint64)
        self.keys = Keys(len(self._secret.serialize()), len(self._compression.serialize()), "one job")

    def x_max(self, tokens: int) -> int:
        """See `EngineUnderTest.x_max`."""
        return EIGHT_BITS

    def multiply(self, x: torch.Tensor) -> Measurement:
        """See `EngineUnderTest.multiply`."""
        library, clock = self._library, Clock()
        operand = quantize_operand(x, EIGHT_BITS)
        values = np.ascontiguousarray(operand.values.t().to(torch.int64).numpy()).view(np.uint64)
        up = library.encrypt_matrix(self._secret, self._parameters, values).serialize()
        encrypt_s, _ = clock.read()
        encrypted = library.EncryptedMatrix.deserialize(up)
        down = library.matrix_multiplication(encrypted, self._weights, self._compression).serialize()
        worker = clock.read()
        result = library.CompressedResultEncryptedMatrix.deserialize(down)
        last = self._columns % self._degree or self._degree
        clear = library.decrypt_matrix(
            result, self._secret, self._parameters, num_valid_glwe_values_in_last_ciphertext=last
        )
        products = torch.from_numpy(np.ascontiguousarray(clear.view(np.int64)[: len(x), : self._columns].T))
        y = dequantize_result(products, operand.scales)
        decrypt_s, _ = clock.read()
        return Measurement(encrypt_s, *worker, decrypt_s, len(up), len(down), y)


def _load_peer() -> ModuleType:
    try:
        import concrete_ml_extensions
    except (ImportError, OSError) as error:
        raise UsageError(
            f"{PEER} is not installed or does not load: {error}", hint=f"pip install {PEER}=={PEER_VERSION}"
        ) from error
    module: ModuleType = concrete_ml_extensions
    return module


_LOADERS: Mapping[str, Callable[[], object]] = MappingProxyType({"concrete": load_fhe, PEER: _load_peer})


def missing(name: str) -> str | None:
    """Why an engine cannot be measured here, and what to do; None when it can."""
    try:
        if load := _LOADERS.get(name):
            load()
    except UsageError as error:
        return str(error)
    return None


def open_engine_under_test(name: str, workload: Workload, compute: Compute) -> EngineUnderTest:
    """The engine called `name`, ready to multiply by the workload's matrix."""
    return Peer(workload) if name == PEER else HetrainEngine(name, workload, compute)
