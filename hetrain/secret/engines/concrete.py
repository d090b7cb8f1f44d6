"""Client half of `concrete`: LWE ciphertexts of Zama Concrete, exact integer products.

An operand is quantised to 8 bits per token and cut into tiles of rows
(`hetrain.public.concrete.circuits.tile`), the last one filled up with zeros. Every entry becomes an LWE
ciphertext under the job's key. Keys stay in this process; randomness and arithmetic are Concrete's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hetrain.public.concrete.circuits import Circuit, compile_circuit, tile
from hetrain.public.concrete.header import ConcreteHeader, ConcreteSetup
from hetrain.public.concrete.package import package_version, unswitch
from hetrain.public.errors import WireError
from hetrain.public.lattice.parameters import require_tokens
from hetrain.public.protocol.messages import Header
from hetrain.public.protocol.plan import Plan
from hetrain.public.protocol.product import Operand, Part, Product, products_of
from hetrain.secret.activation_quantization import dequantize_result, quantize_operand

DEFAULT_BITS, MAX_BITS = 8, 12


@dataclass(frozen=True, eq=False, repr=False)
class ConcreteOpening:
    """The keys of the job, the scales of the tokens, and how large a product can be."""

    circuit: Circuit
    keys: Any
    scales: torch.Tensor
    bound: int

    def check(self, part: Part) -> None:
        """See `hetrain.secret.engine.Opening.check`."""
        self._tile_bytes(part)

    def open(self, parts: Sequence[Part]) -> torch.Tensor:
        """Y = X·Wᵀ, float32 [T, n]; see `hetrain.secret.engine.Opening`."""
        values = np.concatenate([self.decrypt(part) for part in parts], axis=1)
        return dequantize_result(torch.from_numpy(np.ascontiguousarray(values.T)), self.scales)

    def decrypt(self, part: Part) -> NDArray[np.int64]:
        """The exact products, int64 [T, n].

        Raises:
            WireError: the result's length is not that of its rows, or a value is too large to be a product.
        """
        step = self._tile_bytes(part)
        tiles = [part.data[i : i + step] for i in range(0, part.data.nbytes, step)]
        values: NDArray[np.int64] = np.concatenate([self._decrypt_tile(tile, part.n) for tile in tiles])
        values = values[: len(self.scales)]
        if int(np.abs(values).max(initial=0)) > self.bound:
            raise WireError(
                "a result is larger than any product can be",
                where=self.circuit.spec.name,
                hint="a worker computed wrongly, or a blob was damaged",
            )
        return values

    def _tile_bytes(self, part: Part) -> int:
        """Bytes of one tile's results. Raises `WireError` unless there are as many as tiles."""
        rows = self.circuit.spec.rows
        step = rows * part.n * self.circuit.value_bytes()
        expected = -(-len(self.scales) // rows) * step
        if part.data.nbytes != expected:
            raise WireError(f"a result of {part.n} rows has {part.data.nbytes} bytes, not {expected}")
        return step

    def _decrypt_tile(self, part: memoryview, n: int) -> NDArray[np.int64]:
        spec, circuit = self.circuit.spec, self.circuit
        words = unswitch(part, circuit.result_bytes).reshape(spec.rows, n, circuit.dimension + 1)
        out = np.empty((spec.rows, n), np.int64)
        whole = np.zeros((spec.rows, spec.columns, circuit.dimension + 1), np.uint64)
        for start in range(0, n, spec.columns):
            piece = words[:, start : start + spec.columns]
            whole[:, : piece.shape[1]] = piece
            clear = self.keys.decrypt(circuit.results.value(whole.data.cast("B")))
            out[:, start : start + spec.columns] = np.reshape(clear, whole.shape[:2])[:, : piece.shape[1]]
        return out

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("an opening holds secret keys and cannot be pickled or copied")


@dataclass(frozen=True, eq=False, repr=False)
class ConcreteSealed:
    """The words of encrypted tiles, one after the other; the header names the circuit."""

    operand: Operand
    opening: ConcreteOpening


class ConcreteSealer:
    """See `hetrain.secret.engine.Sealer`. Compiles all circuits of a plan and draws the job's keys.

    Args:
        plan: the job's products.
        bits: most bits of an operand's entries, at most `MAX_BITS`; None means 8.

    Raises:
        UsageError: concrete-python is missing.
        ParameterError: a product cannot be compiled.
    """

    def __init__(self, plan: Plan, bits: int | None = None) -> None:
        self._x_max = (1 << ((bits or DEFAULT_BITS) - 1)) - 1
        self._circuits = {
            circuit.spec: circuit for product in products_of(plan) for circuit in [self._compile(product)]
        }
        self._keys = _draw_keys(self._circuits)

    @property
    def setup(self) -> Header:
        """Package version, operand range, and the digest of every circuit."""
        digests = {spec.name: circuit.digest for spec, circuit in self._circuits.items()}
        return ConcreteSetup(package_version=package_version(), x_max=self._x_max, circuits=digests).to_wire()

    def seal(self, x: torch.Tensor, product: Product) -> ConcreteSealed:
        """Encrypts one operand; see `hetrain.secret.engine.Sealer.seal`."""
        require_tokens(x.shape[0])
        operand = quantize_operand(x, self._x_max)
        circuit = self._compile(product)
        keys, spec = self._keys[circuit.spec], circuit.spec
        values = operand.values.t().to(torch.int64).numpy()
        padded = np.zeros((-(-len(values) // spec.rows) * spec.rows, spec.k), np.int64)
        padded[: len(values)] = values
        payload = [
            memoryview(circuit.operands.words(keys.encrypt(padded[start : start + spec.rows], None)[0]))
            for start in range(0, len(padded), spec.rows)
        ]
        header = ConcreteHeader(
            circuit=circuit.digest, rows=spec.rows, columns=spec.columns, x_max=spec.x_max
        ).to_wire()
        # Ranges end at tile borders: a part of a tile costs as much as the whole.
        return ConcreteSealed(
            Operand(header, payload, len(padded) * circuit.value_bytes(), row_step=spec.columns),
            ConcreteOpening(circuit, keys, operand.scales, bound=self._x_max * max(product.max_l1, 1)),
        )

    def _compile(self, product: Product) -> Circuit:
        return compile_circuit(tile(product.k, product.n, self._x_max))


def _draw_keys(circuits: Mapping[Any, Circuit]) -> dict[Any, Any]:
    """A key holder for every circuit; circuits whose keys have the same description share them."""
    drawn: dict[str, Any] = {}
    holders = {}
    for spec, circuit in circuits.items():
        holder = circuit.new_keys()
        if circuit.key_id in drawn:
            holder.keys = drawn[circuit.key_id]
        drawn[circuit.key_id] = holder.keys
        holders[spec] = holder
    return holders
