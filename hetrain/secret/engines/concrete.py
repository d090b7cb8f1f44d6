"""Client half of `concrete`: LWE ciphertexts of Zama Concrete, exact integer products.

An operand is quantised to 8 bits per token and cut into tiles of rows
(`hetrain.public.concrete.circuits.tile`), the last one filled up with zeros. Every entry becomes an LWE
ciphertext under a key of its micro-batch. Keys stay in this process; randomness and arithmetic are
Concrete's.

Results are verified exactly, but on what they decrypt to: noise hides in the ciphertexts. So a worker learns
from a rejection a little about that micro-batch's key, and about no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hetrain.public.concrete.circuits import Circuit, compile_circuit, tile
from hetrain.public.concrete.header import ConcreteHeader, ConcreteSetup
from hetrain.public.concrete.package import package_version, unswitch
from hetrain.public.errors import WireError
from hetrain.public.lattice.bounds import LARGEST_ENTRY, OperandBound
from hetrain.public.lattice.parameters import require_tokens
from hetrain.public.model.quantization import Scales
from hetrain.public.protocol.messages import Header
from hetrain.public.protocol.plan import Plan
from hetrain.public.protocol.product import Operand, Part, Product, products_of
from hetrain.secret.activation_quantization import dequantize_result, largest_entry, quantize_operand
from hetrain.secret.verification.job import Verification
from hetrain.secret.verification.parts import PartsCheck
from hetrain.secret.verification.rows import CheckRows

DEFAULT_BITS, MAX_BITS = 8, 12
MIN_ROWS = 40
"""Rows of one verification: a wrong product passes with probability 2^-40."""
_LARGEST_RESULT = 1 << 36


@dataclass(frozen=True, eq=False, repr=False)
class ConcreteClaim:
    """Y must be X·Wᵀ exactly: see `hetrain.secret.verification.parts.Claim`.

    Attributes:
        circuit: what workers evaluate.
        keys: of the micro-batch.
        x: the integers of the operand, int64 [T, K].
        rows: draws rows R and R·W.
        rows_for: makes new rows for a range of W.
    """

    circuit: Circuit
    keys: Any
    x: torch.Tensor
    rows: Callable[[], CheckRows]
    rows_for: Callable[[torch.Tensor], CheckRows]

    def read(self, part: Part) -> torch.Tensor:
        """The products of the part's rows, int64 [T, n]."""
        step = self._tile_bytes(part)
        tiles = [part.data[i : i + step] for i in range(0, part.data.nbytes, step)]
        return torch.from_numpy(np.concatenate([self._decrypt_tile(tile, part.n) for tile in tiles]))[
            : len(self.x)
        ]

    def holds(self, rows: CheckRows, results: Sequence[torch.Tensor]) -> bool:
        """Whether r·y = (r·W)·x for every row and token, over the integers: float64 is exact here."""
        y = torch.cat(list(results), dim=1)
        if int(y.abs().max()) >= _LARGEST_RESULT:
            return False
        claimed = rows.values.to(torch.float64) @ y.to(torch.float64).t()
        return torch.equal(claimed, rows.image.to(torch.float64) @ self.x.to(torch.float64).t())

    def _tile_bytes(self, part: Part) -> int:
        """Bytes of one tile's results. Raises `WireError` unless there are as many as tiles."""
        rows = self.circuit.spec.rows
        step = rows * part.n * self.circuit.value_bytes()
        expected = -(-len(self.x) // rows) * step
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
        raise TypeError("a claim holds secret keys and cannot be pickled or copied")


@dataclass(frozen=True, eq=False, repr=False)
class ConcreteOpening:
    """The parts of one product, which know the keys, and the scales of the tokens and of W's rows."""

    parts: PartsCheck[CheckRows, torch.Tensor]
    scales: torch.Tensor
    outputs: torch.Tensor | None

    def check(self, part: Part) -> None:
        """Decrypts the part, and verifies the product once it is complete."""
        self.parts.add(part)

    def open(self) -> torch.Tensor:
        """Y = X·Wᵀ, float32 [T, n]; see `hetrain.secret.engine.Opening`."""
        values = torch.cat([each.values for each in self.parts.results()], dim=1)
        return dequantize_result(values, self.scales, self.outputs)


@dataclass(frozen=True, eq=False, repr=False)
class ConcreteSealed:
    """The words of encrypted tiles, one after the other; the header names the circuit."""

    operand: Operand
    opening: ConcreteOpening


class ConcreteSealer:
    """See `hetrain.secret.engine.Sealer`. Compiles all circuits of a plan and draws keys.

    Args:
        plan: the job's products.
        verification: rows that check results; at least `MIN_ROWS` of them are used.
        bits: most bits of an operand's entries, at most `MAX_BITS`; None means 8.

    Raises:
        UsageError: concrete-python is missing.
        ParameterError: a product cannot be compiled.
    """

    def __init__(self, plan: Plan, verification: Verification, bits: int | None = None) -> None:
        self._bits = bits or DEFAULT_BITS
        self._x_max = largest_entry(self._bits)
        self._verification = replace(verification, count=max(verification.count, MIN_ROWS))
        self._circuits = {
            circuit.spec: circuit for product in products_of(plan) for circuit in [self._compile(product)]
        }
        self._keys = _draw_keys(self._circuits)

    @property
    def setup(self) -> Header:
        """Package version, operand range, and the digest of every circuit."""
        digests = {spec.name: circuit.digest for spec, circuit in self._circuits.items()}
        return ConcreteSetup(package_version=package_version(), x_max=self._x_max, circuits=digests).to_wire()

    def for_micro_batch(self) -> ConcreteSealer:
        """The same with fresh keys."""
        sealer = copy(self)
        sealer._keys = _draw_keys(self._circuits)
        return sealer

    def seal(self, x: torch.Tensor, product: Product, channels: Scales | None = None) -> ConcreteSealed:
        """Encrypts one operand; see `hetrain.secret.engine.Sealer.seal`."""
        require_tokens(x.shape[0])
        columns = None if channels is None else channels.inputs
        operand = quantize_operand(x, OperandBound(LARGEST_ENTRY, norm=0.0), self._bits, columns)
        circuit = self._compile(product)
        keys, spec = self._keys[circuit.spec], circuit.spec
        values = operand.values.to(torch.int64)
        padded = np.zeros((-(-len(values) // spec.rows) * spec.rows, spec.k), np.int64)
        padded[: len(values)] = values.numpy()
        payload = [
            memoryview(circuit.operands.words(keys.encrypt(padded[start : start + spec.rows], None)[0]))
            for start in range(0, len(padded), spec.rows)
        ]
        header = ConcreteHeader(
            circuit=circuit.digest, rows=spec.rows, columns=spec.columns, x_max=spec.x_max
        ).to_wire()
        claim = ConcreteClaim(circuit, keys, values, *self._verification.rows_of(product))
        # Ranges end at tile borders: a part of a tile costs as much as the whole.
        return ConcreteSealed(
            Operand(
                header,
                payload,
                result_bytes=len(padded) * circuit.value_bytes() * product.n,
                row_step=spec.columns,
            ),
            ConcreteOpening(
                PartsCheck(product, claim, self._verification.weights),
                operand.scales,
                None if channels is None else channels.outputs,
            ),
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
