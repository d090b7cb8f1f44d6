"""Zama Concrete circuits: x·W with x encrypted and W clear, compiled by client and worker each for itself.

Both sides build a circuit from the same small `CircuitSpec` and compare digests; no compiled code ever
crosses the queue.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import math
import shutil
import threading
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hetrain.public.concrete.package import (
    PACKAGE,
    Frame,
    evaluation_keys,
    load_fhe,
    package_version,
    prepare_thread,
    security_level,
    signal_handlers_kept,
    switch,
    unswitch,
)
from hetrain.public.errors import ParameterError

if TYPE_CHECKING:
    from numpy.typing import NDArray

P_ERROR = 2.0**-64
"""Probability that an output value is wrong: one in 10^19."""
SECURITY_BITS = 128
W_MAX = 127
OPERAND_BYTES = 24
"""Bytes per encrypted input: the seed of its mask and its body, 64 bits."""

MAX_ROWS, MAX_COLUMNS = 16, 1024
_MAX_TILE_RESULTS, _MAX_TILE_OPERANDS = 1024, 4096
_FOUR_BYTE_WIDTH, _MAX_WIDTH = 22, 31
# log2 of the noise's standard deviation over the modulus, by dimension: Concrete's own curve of 128 bits of
# security. For n = 1400 to 1650 malb/lattice-estimator (commit 27a581bb) gives 128.7 to 128.8 bits (MATZOV).
_NOISE_CURVE = (-0.0256967, 2.67593)


@dataclass(frozen=True)
class CircuitSpec:
    """All that a circuit depends on: it multiplies x [rows, k] by a clear w [k, columns], |x| ≤ x_max,
    |w| ≤ 127.
    """

    rows: int
    k: int
    columns: int
    x_max: int
    p_error: float = P_ERROR
    security_bits: int = SECURITY_BITS

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"circuit-{self.rows}x{self.k}x{self.columns}-{self.x_max}"

    @property
    def operand_bytes(self) -> int:
        """Bytes of an encrypted tile of x."""
        return OPERAND_BYTES * self.rows * self.k


def tile(k: int, n: int, x_max: int) -> CircuitSpec:
    """The circuit that covers a product of inner width `k` and `n` result columns, tile by tile.

    K is never cut: every cut would double results, the largest part of the traffic. Columns are cut evenly
    into tiles of at most 1024, and rows such that a tile's results and operands stay a few megabytes.
    """
    columns = -(-n // -(-n // MAX_COLUMNS))
    rows = min(_MAX_TILE_RESULTS // columns, _MAX_TILE_OPERANDS // k, MAX_ROWS)
    return CircuitSpec(1 << max(rows, 1).bit_length() - 1, k, columns, x_max)


@dataclass(frozen=True, eq=False)
class Circuit:
    """A compiled circuit and what both sides know of it.

    Attributes:
        spec: what it was compiled from.
        server: Concrete's evaluating half; holds no key.
        client_specs: Concrete's description of keys and encodings, from which a client makes its keys.
        digest: SHA-256 over spec, package version and client specs: equal on both sides or the job ends.
        dimension: LWE dimension n.
        width: bits of a result, sign included.
        key_id: circuits of one key_id use keys alike.
        operands: the frame of an encrypted tile of x.
        results: the frame of a tile of results.
    """

    spec: CircuitSpec
    server: Any
    client_specs: Any
    digest: str
    dimension: int
    width: int
    key_id: str
    operands: Frame
    results: Frame

    @property
    def result_bytes(self) -> int:
        """Bytes that each word of a result keeps when it travels; the noise margin stays above 16 σ."""
        return 4 if self.width <= _FOUR_BYTE_WIDTH else 5

    def value_bytes(self) -> int:
        """Bytes of one result value on the wire: n mask words and a body."""
        return (self.dimension + 1) * self.result_bytes

    def multiply(self, operand: Any, weights: NDArray[np.int64]) -> Any:
        """An encrypted x·w.

        Args:
            operand: a tile of x.
            weights: int64 [k, columns], C-contiguous (other layouts are silently misread), |w| ≤ 127.
        """
        return self.server.run(operand, weights, evaluation_keys=evaluation_keys())

    def new_keys(self) -> Any:
        """A key holder with fresh keys, from the operating system's entropy."""
        holder = load_fhe().Client(self.client_specs)
        holder.keygen()
        return holder


_compiling = threading.Lock()


def compile_circuit(spec: CircuitSpec, *, use_gpu: bool = False) -> Circuit:
    """The circuit of `spec`: one of the 256 that this process used last, or a new one. Thread-safe.

    Compiling takes about 0.1 s, and the trial of the result up to a few seconds. No compiled code is kept on
    disk, where others could replace it.

    Raises: as `build_circuit`.
    """
    with _compiling:
        return _recent(spec, use_gpu)


@signal_handlers_kept()
def build_circuit(spec: CircuitSpec, use_gpu: bool = False) -> Circuit:
    """Compiles `spec` and tries the result. Not thread-safe.

    Raises:
        UsageError: concrete-python is missing.
        ParameterError: Concrete finds no parameters for it, or does not behave as this code expects.
    """
    fhe = load_fhe()
    prepare_thread()
    configuration = fhe.Configuration(
        compress_input_ciphertexts=True,
        p_error=spec.p_error,
        security_level=security_level(spec.security_bits),
        loop_parallelize=False,  # tiles run beside each other instead
        use_gpu=use_gpu,
        dump_artifacts_on_unexpected_failures=False,
    )
    # The two extremes fix all bit widths; a set of one sign would make x unsigned.
    weights = np.full((spec.k, spec.columns), -W_MAX, np.int64)
    inputs = [(np.full((spec.rows, spec.k), sign * spec.x_max, np.int64), weights) for sign in (1, -1)]
    try:
        compiled = fhe.Compiler(_product, {"x": "encrypted", "w": "clear"}).compile(inputs, configuration)
        server, client_specs = compiled.server, compiled.client.specs
        description = client_specs.serialize()
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise ParameterError(
            f"Concrete cannot compile this product: {(str(error) or repr(error)).splitlines()[0]}",
            where=spec.name,
            hint="leave it out with `outsource`, use fewer `activation_bits`, or take another `engine`",
        ) from error
    atexit.register(shutil.rmtree, server._library.get_output_dir_path(), ignore_errors=True)
    return _describe(spec, server, client_specs, description)


_recent = functools.lru_cache(maxsize=256)(build_circuit)


def _describe(spec: CircuitSpec, server: Any, client_specs: Any, description: bytes) -> Circuit:
    facts = json.loads(description)
    encoding = facts["circuits"][0]["inputs"][0]["typeInfo"]["lweCiphertext"]
    dimension = int(encoding["encryption"]["lweDimension"])
    _require_security(spec, dimension, float(encoding["encryption"]["variance"]))
    width = int(encoding["encoding"]["integer"]["width"])
    if width > _MAX_WIDTH:
        raise ParameterError(
            f"results of {width} bits leave too little room for noise, at most {_MAX_WIDTH} do",
            where=spec.name,
            hint="use fewer `activation_bits`, or leave it out with `outsource`",
        )
    identity = json.dumps(asdict(spec) | {"package": package_version()}, sort_keys=True).encode()
    # A key that opens nothing: it is thrown away with this function.
    holder = load_fhe().Client(client_specs)
    holder.keygen()
    zeros = np.zeros((spec.rows, spec.k), np.int64)
    operand = holder.encrypt(zeros, None)[0]
    result = server.run(
        operand, np.zeros((spec.k, spec.columns), np.int64), evaluation_keys=evaluation_keys()
    )
    circuit = Circuit(
        spec=spec,
        server=server,
        client_specs=client_specs,
        digest=hashlib.sha256(identity + description).hexdigest(),
        dimension=dimension,
        width=width,
        key_id=json.dumps(facts["keyset"], sort_keys=True),
        operands=Frame.of(operand, spec.operand_bytes),
        results=Frame.of(result, 8 * spec.rows * spec.columns * (dimension + 1)),
    )
    _check_frames(circuit, holder)
    return circuit


def _require_security(spec: CircuitSpec, dimension: int, variance: float) -> None:
    """Raises `ParameterError` when the noise (variance relative to the modulus) is below the curve."""
    slope, offset = _NOISE_CURVE
    if math.log2(variance) / 2 < slope * dimension + offset - 0.01:
        raise ParameterError(
            f"{PACKAGE} {package_version()} chose dimension {dimension} with too little noise for "
            f"{SECURITY_BITS} bits of security",
            where=spec.name,
        )


def _check_frames(circuit: Circuit, holder: Any) -> None:
    """Whether a second ciphertext has the same frame, and survives being taken apart and put together."""
    spec, rng = circuit.spec, np.random.default_rng(0)
    x = rng.integers(-spec.x_max, spec.x_max + 1, (spec.rows, spec.k))
    w = rng.integers(-W_MAX, W_MAX + 1, (spec.k, spec.columns))
    operand = circuit.operands.value(circuit.operands.words(holder.encrypt(x, None)[0]))
    result = circuit.results.words(circuit.multiply(operand, w))
    switched = switch(np.frombuffer(result, "<u8"), circuit.result_bytes)
    words = unswitch(memoryview(switched), circuit.result_bytes).tobytes()
    if not np.array_equal(holder.decrypt(circuit.results.value(words)), x @ w):
        raise ParameterError(
            f"{PACKAGE} {package_version()} does not compute this product correctly",
            where=spec.name,
            hint="on a GPU build, take the CPU build of the package",
        )


def _product(x: Any, w: Any) -> Any:
    return x @ w
