"""What encryption and transport take of this machine's processors, measured on a trivial product.

Of the matrix 0 all results and hints are zeros, so that no worker is needed, and the kernels take as long as
with any other.
"""

from __future__ import annotations

import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time

import torch

from hetrain.public.lattice.parameters import SLOTS
from hetrain.public.lattice.ring import LANES
from hetrain.public.model.quantization import Norms, Scales
from hetrain.public.protocol.plan import Group, Member
from hetrain.public.protocol.product import Part, Product
from hetrain.secret.engines.rlwe.hints import HintStore
from hetrain.secret.engines.rlwe.seal import RlweSealer
from hetrain.secret.verification.job import Verification, kept_rows

_WIDTH = 512
_ROUNDS, _BUDGET_S = 8, 2.0
_PIECE_BYTES, _PIECES = 1 << 16, 256
_NORMS = Norms(l1=1 << 14, squares=1 << 20)


@dataclass(frozen=True)
class CryptoCosts:
    """Processor seconds: to seal a value, to verify and open one, and to send or receive a byte."""

    seal_s: float
    open_s: float
    byte_s: float


def measure_crypto() -> CryptoCosts:
    """The best of a few products of 512 features with 2048 tokens, and 16 MB through a local socket.

    Raises:
        UsageError: the directory of temporary files cannot be written to.
    """
    product = _product()
    matrix = torch.zeros(_WIDTH, _WIDTH, dtype=torch.int8)
    x, scales = torch.randn(SLOTS, _WIDTH), torch.rand(_WIDTH)
    with tempfile.TemporaryDirectory(prefix="hetrain-probe-") as scratch:
        hints = HintStore(Path(scratch))
        hints.keep(product, [torch.zeros(_WIDTH // LANES, SLOTS, LANES, dtype=torch.int32)])
        verification = Verification(kept_rows(product.group, matrix), lambda product: matrix)
        sealer = RlweSealer(verification, hints)
        rounds: list[tuple[float, float]] = []
        end = perf_counter() + _BUDGET_S
        while not rounds or (len(rounds) < _ROUNDS and perf_counter() < end):
            rounds.append(_round(sealer, product, x, scales))
    values = SLOTS * _WIDTH
    return CryptoCosts(
        seal_s=min(seal for seal, _ in rounds) / values,
        open_s=min(opened for _, opened in rounds) / values,
        byte_s=_byte_seconds(),
    )


def _product() -> Product:
    member = Member(module="probe", tensor="probe", out_features=_WIDTH)
    group = Group(
        name="probe",
        members=(member,),
        in_features=_WIDTH,
        forward=_NORMS,
        backward=_NORMS,
        digest="0" * 64,
    )
    return Product(group, "forward")


def _round(
    sealer: RlweSealer, product: Product, x: torch.Tensor, scales: torch.Tensor
) -> tuple[float, float]:
    """Seconds to scale and seal an operand, and to verify, open and scale its result."""
    begin = process_time()
    sealed = sealer.seal(x, product, Scales(scales, scales))
    middle = process_time()
    zeros = memoryview(bytearray(sealed.operand.result_bytes))
    received = process_time()
    sealed.opening.check(Part((0, product.n), zeros))
    sealed.opening.open()
    return middle - begin, process_time() - received


def _byte_seconds() -> float:
    """Half of what a byte costs that this process both sends and receives."""
    data, room = bytes(_PIECE_BYTES), bytearray(_PIECE_BYTES)
    sender, receiver = socket.socketpair()
    with sender, receiver:
        sender.settimeout(5)
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * _PIECE_BYTES)
        begin = process_time()
        for _ in range(_PIECES):
            sender.sendall(data)
            left = _PIECE_BYTES
            while left:
                left -= receiver.recv_into(room, left)
        return (process_time() - begin) / (2 * _PIECES * _PIECE_BYTES)
