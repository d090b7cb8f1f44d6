"""The engines under test: hetrain's own and Zama's library for the same product, behind one interface."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Protocol

import numpy as np
import torch

from benchmarks.local_job import Clock, LocalJob
from benchmarks.workloads import Workload
from hetrain.public.concrete.circuits import compile_circuit, tile
from hetrain.public.concrete.package import load_fhe
from hetrain.public.errors import UsageError
from hetrain.public.lattice.bounds import LARGEST_ENTRY, OperandBound, operand_bound
from hetrain.public.lattice.parameters import SLOTS, parameters_for
from hetrain.public.protocol.product import Part, Product
from hetrain.secret.activation_quantization import (
    QuantizedOperand,
    dequantize_result,
    largest_entry,
    quantize_operand,
)
from hetrain.secret.engines.concrete import DEFAULT_BITS
from worker_gpu.device import Compute

PEER, PEER_VERSION = "concrete-ml-extensions", "0.2.0"


@dataclass(frozen=True)
class Keys:
    """Bytes of a client's secret key and of the evaluation keys that workers get; how long both serve."""

    secret_bytes: int
    evaluation_bytes: int
    serve: str


@dataclass(frozen=True)
class Measurement:
    """One product on its whole way: seconds, bytes, y float32 [T, N]. `decrypt_s` includes verification."""

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
    rounding: Rounding

    def multiply(self, x: torch.Tensor) -> Measurement:
        """X·Qᵀ for float32 [T, K]: encrypted, evaluated, decrypted."""
        ...


@dataclass(frozen=True)
class Rounding:
    """How an engine quantises operands: `hetrain.secret.activation_quantization.quantize_operand`."""

    bound: OperandBound
    bits: int | None = None

    def quantize(self, x: torch.Tensor) -> QuantizedOperand:
        """float32 [T, K] as integers."""
        return quantize_operand(x, self.bound, self.bits)


EIGHT_BITS = Rounding(OperandBound(LARGEST_ENTRY, norm=0.0), DEFAULT_BITS)


@dataclass(frozen=True)
class Traits:
    """An engine's properties that a measurement needs: the sizes of its keys, and how it rounds operands."""

    keys: Callable[[Workload], Keys]
    rounding: Callable[[Workload], Rounding]


def _no_wrap(workload: Workload) -> Rounding:
    return Rounding(operand_bound(workload.group.forward, workload.group.out_features))


def _rlwe_keys(workload: Workload) -> Keys:
    return Keys(parameters_for(SLOTS).dimension, 0, "one ciphertext matrix")  # ternary, a byte each


def _concrete_keys(workload: Workload) -> Keys:
    n, k = workload.matrix.shape
    holder = compile_circuit(tile(k, n, largest_entry(DEFAULT_BITS))).new_keys()
    return Keys(len(holder.keys.serialize()), len(holder.evaluation_keys.serialize()), "one micro-batch")


TRAITS: Mapping[str, Traits] = MappingProxyType(
    {
        "rlwe": Traits(_rlwe_keys, _no_wrap),
        "clear": Traits(lambda workload: Keys(0, 0, ""), _no_wrap),
        "concrete": Traits(_concrete_keys, lambda workload: EIGHT_BITS),
    }
)


class HetrainEngine:
    """An engine of hetrain: its client half, and a worker's service, through the queue's messages."""

    def __init__(self, name: str, workload: Workload, compute: Compute) -> None:
        self._product = Product(workload.group, "forward")
        self._job = LocalJob(name, workload.plan, workload.directory, workload.verification, compute)
        self.keys = TRAITS[name].keys(workload)
        self.rounding = TRAITS[name].rounding(workload)
        self.multiply(workload.x[:1])  # warm

    def multiply(self, x: torch.Tensor) -> Measurement:
        """See `EngineUnderTest.multiply`."""
        clock, verified = Clock(), 0.0
        sealed = self._job.sealer.seal(x, self._product)
        encrypt_s, _ = clock.read()

        def check(part: Part) -> None:
            nonlocal verified
            clock.read()
            sealed.opening.check(part)
            verified += clock.read()[0]

        reply = self._job.channel.multiply(self._product, sealed.operand, check)
        clock.read()
        y = sealed.opening.open()
        decrypt_s = verified + clock.read()[0]
        return Measurement(encrypt_s, *self._job.worker, decrypt_s, reply.bytes_up, reply.bytes_down, y)


class Peer:
    """concrete-ml-extensions: activations of 8 bits, one GLWE ciphertext for up to 2048 inputs of a token."""

    rounding = EIGHT_BITS

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

    def multiply(self, x: torch.Tensor) -> Measurement:
        """See `EngineUnderTest.multiply`."""
        library, clock = self._library, Clock()
        operand = self.rounding.quantize(x)
        values = np.ascontiguousarray(operand.values.to(torch.int64).numpy()).view(np.uint64)
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
        products = torch.from_numpy(np.ascontiguousarray(clear.view(np.int64)[: len(x), : self._columns]))
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
