"""Evaluating half of `rlwe`: c·Wᵀ modulo q, switched to fewer bits, and W·â for hints. No keys.

Ciphertext matrices as in "Private LoRA Fine-tuning of Open-Source LLMs with Homomorphic Encryption"
(arXiv 2505.07329), with the reduction to plaintext products of Bae, Cheon, Hanrot, Park and Stehlé
(CRYPTO 2024, ePrint 2024/1284) in its simplest form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from hetrain.public.lattice.header import RlweHeader
from hetrain.public.lattice.masks import SEED_BYTES, PublicSeed
from hetrain.public.lattice.parameters import SLOTS
from hetrain.public.lattice.result_format import GROUP, GROUP_BYTES, packed_bytes, read_seed, require_bytes
from hetrain.public.lattice.ring import LANES
from hetrain.public.lattice.uniform_masks import MaskBlocks
from hetrain.public.protocol.messages import EngineHeader, EvaluateTask, Header
from hetrain.public.protocol.plan import Plan
from hetrain.public.protocol.product import Product
from worker_gpu.copies import download, upload
from worker_gpu.device import Compute
from worker_gpu.epilogue import combined_modulo
from worker_gpu.kernels import new_memory, slabs

_MASK_DIGITS = 4
_BYTE_TOPS = -0x7F7F7F80  # 0x80808080 as int32
_BLOCKS = 16  # of masks, made and split into digits at a time


@dataclass(frozen=True)
class RlweEngine:
    """See `worker_gpu.engines.Engine`."""

    compute: Compute

    @property
    def description(self) -> str:
        """Device, kernel and epilogue."""
        return self.compute.description

    def prepare(self, plan: Plan, setup: Header) -> None:
        """Accepts every plan."""
        EngineHeader.from_wire(setup, where="setup")

    def check_operand(self, product: Product, task: EvaluateTask) -> None:
        """As many bytes as a ciphertext matrix of the product's width has, or a seed."""
        header = RlweHeader.from_wire(task.header, where=task.group)
        is_seed = header.operand == "mask_seed"
        expected = SEED_BYTES if is_seed else header.result_format.operand_bytes(product.k)
        require_bytes("operand", task.input.nbytes, expected, where=task.group)

    def evaluate(self, matrix: torch.Tensor, task: EvaluateTask, payload: memoryview) -> list[memoryview]:
        """The packed result of a ciphertext, or the hint of a seed: see `ResultFormat` and `hint_bytes`."""
        header = RlweHeader.from_wire(task.header, where=task.group)
        if header.operand == "mask_seed":
            return download([self._hint(matrix, read_seed(payload, where=task.group))])
        planes = header.result_format.read_operand(payload, matrix.shape[1], where=task.group)
        return download([self._result(matrix, upload(planes, self.compute.device))])

    def _result(self, matrix: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
        n = len(matrix)
        out = new_memory((planes.shape[1], packed_bytes(n)), torch.uint8, planes.device)
        for rows in slabs(planes, n):
            start = rows.start // GROUP * GROUP_BYTES
            part = out[:, start : start + packed_bytes(rows.stop - rows.start)]
            self.compute.epilogue.switch(self.compute.kernel(planes, matrix[rows]), part)
        return out

    def _hint(self, matrix: torch.Tensor, seed: PublicSeed) -> torch.Tensor:
        n, k = matrix.shape
        planes = mask_digits(seed, k, self.compute.device)
        out = new_memory((-(-n // LANES), SLOTS, LANES), torch.int32, planes.device)
        for rows in slabs(planes, n):
            products = self.compute.kernel(planes, matrix[rows])
            words = pad(combined_modulo(products, dropped_bits=0), (0, -products.shape[2] % LANES))
            blocks = slice(rows.start // LANES, -(-rows.stop // LANES))
            out[blocks] = words.view(SLOTS, -1, LANES).transpose(0, 1)
        return out


def mask_digits(seed: PublicSeed, k: int, device: torch.device) -> torch.Tensor:
    """The masks â of k features as signed 8-bit digits, Σ_l 2^(8l)·D_l = â: int8 [4, 2048, k] on `device`."""
    planes = new_memory((_MASK_DIGITS, SLOTS, k), torch.int8, device)
    blocks, masks = MaskBlocks(seed), torch.empty(_BLOCKS, SLOTS, LANES, dtype=torch.int32)
    for first in range(0, k, _BLOCKS * LANES):
        width = min(_BLOCKS * LANES, k - first)
        some = masks[: -(-width // LANES)]
        blocks.fill(some, first // LANES)
        # 0x80 more makes signed digits bytes in 0..255; flipping their top bits makes them signed again.
        words = (upload(some, device) + _BYTE_TOPS) ^ _BYTE_TOPS
        digits = words.view(torch.int8).view(*words.shape, _MASK_DIGITS).permute(3, 1, 0, 2)
        planes[:, :, first : first + width] = digits.reshape(_MASK_DIGITS, SLOTS, -1)[:, :, :width]
    return planes
