"""The cost of training by the model: ``python -m benchmarks.projection``.

Published shapes, the bytes and operations of `benchmarks.hardware.Product`, and the modelled hosts: nothing
here was measured but the client's seconds per coefficient. Left out: the client's own layers (only the output
layer is shown), the broker's processor time, and that the first block's q, k, v need no backward product.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import ceil

from benchmarks.hardware import DECODERS, ClientModel, Decoder, Work, WorkerModel
from benchmarks.output import markdown
from hetrain.public.lattice.parameters import SLOTS
from hetrain.public.lattice.result_format import hint_bytes

TARGET_TOKENS_PER_S = 1000
_GPU_BYTES = 80e9


@dataclass(frozen=True)
class Projection:
    """One model, in full micro-batches of 2048 tokens."""

    decoder: Decoder
    worker: WorkerModel
    client: ClientModel

    @property
    def token(self) -> Work:
        """The work of one token in all blocks, forward and backward."""
        return Work.of(self.decoder.block(), SLOTS / self.decoder.layers)

    @property
    def hint_bytes(self) -> int:
        """Of all hints, on the client's disk."""
        return self.decoder.layers * sum(hint_bytes(product.n) for product in self.decoder.block())

    def cells(self) -> dict[str, str]:
        """The rows of the table."""
        token, worker, client, rate = self.token, self.worker, self.client, TARGET_TOKENS_PER_S
        fast = WorkerModel(network_bits_per_s=client.network_bits_per_s)
        limits = client.limits(token)
        most = min(limits, key=lambda name: limits[name])
        # The output layer's product and its gradient, two operations a weight each.
        head_ops = 2 * 2 * self.decoder.hidden * self.decoder.vocabulary
        return {
            "outsourced weights, GB of int8": f"{self.decoder.weights / 1e9:.1f}",
            "GPUs of 80 GB that hold them": str(ceil(self.decoder.weights / _GPU_BYTES)),
            "hints on the client's disk, GB": f"{self.hint_bytes / 1e9:.0f}",
            "hints read from there, MB per token": f"{self.hint_bytes / SLOTS / 1e6:.1f}",
            "MB up per token": f"{token.bytes_up / 1e6:.1f}",
            "MB down per token": f"{token.bytes_down / 1e6:.1f}",
            "worker, µs per token: tensor cores": f"{1e6 * worker.compute_s(token):.0f}",
            "PCIe": f"{1e6 * worker.pcie_s(token):.0f}",
            f"network of {_gbit(worker)} Gbit/s": f"{1e6 * worker.network_s(token):.0f}",
            "one worker, tokens/s": f"{1 / worker.seconds(token):.0f}",
            f"with {_gbit(fast)} Gbit/s of its own": f"{1 / fast.seconds(token):.0f}",
            "tensor cores alone": f"{1 / worker.compute_s(token):.0f}",
            f"one client, tokens/s: {_gbit(client)} Gbit/s up": f"{limits['network, up']:.0f}",
            f"{_gbit(client)} Gbit/s down": f"{limits['network, down']:.0f}",
            f"{client.cores} cores encrypt, verify, decrypt": f"{limits['cryptography']:.0f}",
            "workers that one client keeps busy": f"{limits[most] * worker.seconds(token):.1f} ({most})",
            f"for {rate} tokens/s: GB/s up": f"{rate * token.bytes_up / 1e9:.1f}",
            "GB/s down": f"{rate * token.bytes_down / 1e9:.1f}",
            f"workers with {_gbit(worker)} Gbit/s": str(ceil(rate * worker.seconds(token))),
            f"workers with {_gbit(fast)} Gbit/s": str(ceil(rate * fast.seconds(token))),
            "client's cores for its cryptography": str(
                ceil(rate * token.coefficients * client.core_s_per_coefficient)
            ),
            "client's output layer, 10^12 operations/s": f"{rate * head_ops / 1e12:.1f}",
        }


def _gbit(host: WorkerModel | ClientModel) -> str:
    return f"{host.network_bits_per_s / 1e9:.0f}"


def table(worker: WorkerModel, client: ClientModel) -> str:
    """A column for each model."""
    columns = {name: Projection(decoder, worker, client).cells() for name, decoder in DECODERS.items()}
    names = next(iter(columns.values()))
    rows = [(name, *(cells[name] for cells in columns.values())) for name in names]
    return markdown(("", *columns), rows)


def main() -> None:
    """Parses arguments, prints."""
    worker, client = WorkerModel(), ClientModel()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--worker-gbit", type=float, default=worker.network_bits_per_s / 1e9)
    parser.add_argument("--client-gbit", type=float, default=client.network_bits_per_s / 1e9)
    parser.add_argument("--cores", type=int, default=client.cores, help="the client's")
    parser.add_argument(
        "--core-ns", type=float, default=1e9 * client.core_s_per_coefficient, help="per coefficient"
    )
    arguments = parser.parse_args()
    if min(vars(arguments).values()) <= 0:
        parser.error("all figures are positive")
    print(
        table(
            WorkerModel(network_bits_per_s=1e9 * arguments.worker_gbit),
            ClientModel(arguments.cores, 1e-9 * arguments.core_ns, 1e9 * arguments.client_gbit),
        )
    )


if __name__ == "__main__":
    main()
