"""Evaluating half of `concrete`: Concrete's circuits for x·W with x encrypted and W clear. Holds no key.

Concrete's GPU build runs circuits on CUDA; by its source, circuits without a bootstrap, like these, stay on
the host's threads. `description` reports the installed build and the device that was found.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from hetrain.public.concrete.circuits import Circuit, CircuitSpec, compile_circuit, tile
from hetrain.public.concrete.header import ConcreteHeader, ConcreteSetup
from hetrain.public.concrete.package import PACKAGE, load_fhe, package_version, switch
from hetrain.public.errors import ParameterError, UsageError, WireError, WorkerRefused
from hetrain.public.lattice.parameters import SLOTS
from hetrain.public.lattice.result_format import require_units
from hetrain.public.protocol.messages import EvaluateTask, Header
from hetrain.public.protocol.plan import Plan
from hetrain.public.protocol.product import Product, products_of
from hetrain.public.system import available_cores
from worker_gpu.device import Compute

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TRIAL_X_MAX = 127

logger = logging.getLogger(__name__)


class ConcreteEngine:
    """See `worker_gpu.engines.Engine`. Tiles are evaluated beside each other, one thread for each core.

    Raises:
        WorkerRefused: concrete-python is missing or does not load.
    """

    def __init__(self, compute: Compute) -> None:
        try:
            load_fhe()
        except UsageError as error:
            raise WorkerRefused(
                f"this worker cannot serve the concrete engine: {error.what}", hint=error.hint
            ) from error
        self._use_gpu, place = _choose_place()
        self._pool = ThreadPoolExecutor(available_cores(), "concrete")
        self.description = f"concrete {package_version()} · {place}"
        logger.info("%s", self.description)

    def prepare(self, plan: Plan, setup: Header) -> None:
        """Compiles the circuits of a plan and compares them with the client's."""
        job = ConcreteSetup.from_wire(setup, where="setup")
        if job.package_version != package_version():
            raise WorkerRefused(
                f"this worker has {PACKAGE} {package_version()}, the client {job.package_version}",
                hint="install the same version on both sides",
            )
        for product in products_of(plan):
            spec = tile(product.k, product.n, job.x_max)
            _compare(self._circuit(spec), job.circuits.get(spec.name), product.group.name)

    def check_operand(self, product: Product, task: EvaluateTask) -> None:
        """Some tiles of the one circuit that the product has; no other is compiled."""
        header = ConcreteHeader.from_wire(task.header, where=task.group)
        spec = header.spec(product.k)
        if spec != tile(product.k, product.n, header.x_max):
            raise WireError(f"{spec.name} is not the circuit of {product}", where=task.group)
        require_units(task.input.nbytes, spec.operand_bytes, spec.operand_bytes * SLOTS, where=task.group)

    def evaluate(self, matrix: torch.Tensor, task: EvaluateTask, payload: memoryview) -> list[memoryview]:
        """See `worker_gpu.engines.Engine.evaluate`.

        Results: for each tile of rows, the switched words of its ciphertexts, [rows, n, LWE dimension + 1].
        """
        header = ConcreteHeader.from_wire(task.header, where=task.group)
        circuit = self._circuit(header.spec(matrix.shape[1]))
        _compare(circuit, header.circuit, task.group)
        nbytes = circuit.operands.nbytes
        require_units(payload.nbytes, nbytes, nbytes * SLOTS, where=task.group)
        operands = [circuit.operands.value(payload[i : i + nbytes]) for i in range(0, payload.nbytes, nbytes)]
        work = partial(_evaluate_tile, circuit, _column_tiles(matrix, circuit.spec.columns), len(matrix))
        return [memoryview(part) for part in self._pool.map(work, operands)]

    def _circuit(self, spec: CircuitSpec) -> Circuit:
        try:
            return compile_circuit(spec, use_gpu=self._use_gpu)
        except ParameterError as error:
            raise WorkerRefused(
                f"this worker cannot compile a circuit: {error.what}", where=error.where
            ) from error


def _choose_place() -> tuple[bool, str]:
    """Whether to compile for a GPU; a description of build and device."""
    from concrete.compiler import check_gpu_available, check_gpu_enabled

    if not check_gpu_enabled():
        return False, "cpu (no GPU build)"
    if not check_gpu_available():
        return False, "cpu (GPU build, no device)"
    try:
        compile_circuit(tile(16, 16, _TRIAL_X_MAX), use_gpu=True)
    except ParameterError as error:
        logger.warning("the GPU is left alone: %s", error)
        return False, "cpu (GPU build, but it fails its self-test)"
    return True, "GPU build and device (circuits without a bootstrap may stay on the host's threads)"


def _compare(circuit: Circuit, clients_digest: str | None, group: str) -> None:
    if clients_digest != circuit.digest:
        raise WorkerRefused(
            f"this worker compiles {circuit.spec.name} to {circuit.digest[:12]}, the client to "
            f"{str(clients_digest)[:12]!r}",
            where=group,
            hint=f"install the same versions of hetrain and {PACKAGE} on both sides",
        )


def _column_tiles(matrix: torch.Tensor, columns: int) -> list[NDArray[np.int64]]:
    """Wᵀ [K, n] in tiles of `columns`, the last one padded with zeros."""
    tiles = []
    for part in torch.split(matrix.cpu(), columns):
        filled = np.zeros((matrix.shape[1], columns), np.int64)
        filled[:, : len(part)] = part.t().numpy()
        tiles.append(filled)
    return tiles


def _evaluate_tile(circuit: Circuit, weights: Sequence[NDArray[np.int64]], n: int, operand: object) -> bytes:
    spec = circuit.spec
    words = [
        np.frombuffer(circuit.results.words(circuit.multiply(operand, w)), "<u8").reshape(
            spec.rows, spec.columns, -1
        )
        for w in weights
    ]
    return switch(np.concatenate(words, axis=1)[:, :n], circuit.result_bytes)
