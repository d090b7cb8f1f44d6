"""The cost of a product on modelled hardware: a GPU worker, a client, and the shapes of public models.

Figures of hardware are data-sheet peaks and stated assumptions, not measurements; every one is a field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from hetrain.public.lattice.parameters import SLOTS, parameters_for
from hetrain.public.lattice.result_format import DIGITS, ResultFormat
from hetrain.public.protocol.messages import DIRECTIONS, Direction


@dataclass(frozen=True)
class WorkerModel:
    """One GPU and its way to the broker; it receives, computes and sends one task after the other.

    Attributes:
        int8_ops_per_s: dense int8 tensor operations, a multiplication and an addition being two; H100 SXM,
            NVIDIA's data sheet (half of the 3958·10^12 that it gives with sparsity).
        int8_share: of that peak which the kernel reaches. Assumed.
        pcie_bytes_per_s: each way; PCIe 5.0 x16 carries 63·10^9 at most, about 50·10^9 are usual.
        network_bits_per_s: each way. Assumed: eight GPUs share a host's 200 Gbit/s.
    """

    int8_ops_per_s: float = 1979e12
    int8_share: float = 0.5
    pcie_bytes_per_s: float = 50e9
    network_bits_per_s: float = 25e9

    @property
    def network_bytes_per_s(self) -> float:
        """Each way."""
        return self.network_bits_per_s / 8

    def gpu_s(self, work: Work | ProductModel) -> float:
        """Seconds on the PCIe bus and in the tensor cores, one after the other."""
        return self.pcie_s(work) + self.compute_s(work)

    def pcie_s(self, work: Work | ProductModel) -> float:
        """(bytes up + bytes down) / rate."""
        return (work.bytes_up + work.bytes_down) / self.pcie_bytes_per_s

    def compute_s(self, work: Work | ProductModel) -> float:
        """Operations / (peak · share)."""
        return work.int8_ops / (self.int8_ops_per_s * self.int8_share)

    def network_s(self, work: Work | ProductModel) -> float:
        """(bytes up + bytes down) / rate."""
        return (work.bytes_up + work.bytes_down) / self.network_bytes_per_s

    def seconds(self, work: Work | ProductModel) -> float:
        """From the first byte received to the last one sent."""
        return self.network_s(work) + self.gpu_s(work)


@dataclass(frozen=True)
class ClientModel:
    """The data owner's host, with the broker on it.

    Attributes:
        cores: that encrypt, verify and decrypt.
        core_s_per_coefficient: of encryption, verification and decryption, half for each direction, one
            thread on one core (``python -m benchmarks.client``).
        network_bits_per_s: each way.
    """

    cores: int = 64
    core_s_per_coefficient: float = 3e-9
    network_bits_per_s: float = 100e9

    def limits(self, work: Work) -> dict[str, float]:
        """The rate at which it can do its part of `work`, per second, for each resource."""
        network = self.network_bits_per_s / 8
        return {
            "network, up": network / work.bytes_up,
            "network, down": network / work.bytes_down,
            "cryptography": self.cores / (work.coefficients * self.core_s_per_coefficient),
        }


@dataclass(frozen=True)
class Work:
    """The work of a product, or of many, for client, network and worker.

    Attributes:
        bytes_up: of operands.
        bytes_down: of results.
        coefficients: encrypted or decrypted.
        int8_ops: the worker's, two for a multiplication and addition.
    """

    bytes_up: float
    bytes_down: float
    coefficients: float
    int8_ops: float

    @staticmethod
    def of(products: Sequence[ProductModel], divisor: float = 1.0) -> Work:
        """The sum of `products` over `divisor`."""
        return Work(
            bytes_up=sum(one.bytes_up for one in products) / divisor,
            bytes_down=sum(one.bytes_down for one in products) / divisor,
            coefficients=sum(one.coefficients for one in products) / divisor,
            int8_ops=sum(one.int8_ops for one in products) / divisor,
        )


@dataclass(frozen=True)
class ProductModel:
    """One encrypted product: K features in, n out, and tokens in the smallest ring that fits."""

    group: str
    direction: Direction
    k: int
    n: int
    tokens: int = SLOTS

    @property
    def degree(self) -> int:
        """N."""
        return parameters_for(self.tokens).ring_degree

    @property
    def result_format(self) -> ResultFormat:
        """Gives the bytes of operand and result."""
        return ResultFormat(parameters_for(self.tokens))

    @property
    def bytes_up(self) -> int:
        """Of the operand."""
        return self.result_format.operand_bytes(self.k)

    @property
    def bytes_down(self) -> int:
        """Of the result."""
        return self.result_format.result_bytes(self.n)

    @property
    def coefficients(self) -> int:
        """(K + n)·N, encrypted and decrypted."""
        return (self.k + self.n) * self.degree

    @property
    def int8_ops(self) -> int:
        """2·3·K·n·N."""
        return 2 * DIGITS * self.k * self.n * self.degree


@dataclass(frozen=True)
class Decoder:
    """The published shape of a Llama-like model."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def groups(self) -> Mapping[str, tuple[int, int]]:
        """name -> (K, n) of the groups of one block, in the order of a forward pass."""
        attention = self.heads * self.head_dim
        return {
            "qkv": (self.hidden, attention + 2 * self.kv_heads * self.head_dim),
            "o": (attention, self.hidden),
            "gate_up": (self.hidden, 2 * self.ffn),
            "down": (self.ffn, self.hidden),
        }

    @property
    def weights(self) -> int:
        """Of all outsourced matrices; bytes, as they are int8."""
        return self.layers * sum(k * n for k, n in self.groups.values())

    def block(self, tokens: int = SLOTS) -> tuple[ProductModel, ...]:
        """The products of one block: forward, then backward in the opposite order."""
        forward, backward = DIRECTIONS
        there = [ProductModel(name, forward, k, n, tokens) for name, (k, n) in self.groups.items()]
        return (*there, *(ProductModel(one.group, backward, one.n, one.k, tokens) for one in there[::-1]))


LLAMA_8B, LLAMA_70B = "Llama-3.1-8B", "Llama-3.1-70B"
DECODERS: Mapping[str, Decoder] = MappingProxyType(
    {
        LLAMA_8B: Decoder(4096, 14336, 32, 32, 8, 128, 128256),
        LLAMA_70B: Decoder(8192, 28672, 80, 64, 8, 128, 128256),
    }
)
