"""Hints: products W·a with masks that a job uses again and again, kept by the client on disk.

Within a job the public mask of a (group, direction) stays the same while every ciphertext has a secret of its
own (LWE with a shared public matrix, as in SimplePIR, ePrint 2022/949). So W·a is computed once: the first
result that brings it is checked and kept, and from then on workers compute and send W·b alone. All rings
share it: a mask is 2048 words for each row, however they are cut into polynomials.

Hints are public. They lie in a file without a name, which ends with the process.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from hetrain.public.errors import ResultRejected, WireError
from hetrain.public.lattice.masks import PublicSeed, expand_mask
from hetrain.public.lattice.parameters import SLOTS
from hetrain.public.lattice.result_format import A_SHIFT, HINT_PLANES, join_planes, row_bytes
from hetrain.public.protocol.plan import Group, Plan
from hetrain.public.protocol.product import Part, Product, ProductKey, RowRange, products_of
from hetrain.secret.verification import Sketch

ROW_BYTES = row_bytes(HINT_PLANES)
_CHECK_ROWS_AT_ONCE = 1024

_log = logging.getLogger(__name__)


def sketches_of(group: Group, matrix: torch.Tensor) -> dict[ProductKey, Sketch]:
    """Sketches that check both products with the group's int8 matrix [out_features, in_features]."""
    return {
        (group.name, "forward"): Sketch.of(matrix),
        (group.name, "backward"): Sketch.of(matrix.t()),
    }


def hint_bytes(plan: Plan) -> int:
    """Bytes on disk that all hints of a plan take."""
    return ROW_BYTES * sum(product.n for product in products_of(plan))


@dataclass
class Hint:
    """The product with the mask of one (group, direction). Thread-safe.

    Attributes:
        seed: expands to the mask, [K, 2048] words.
        operand_rows: K.
        rows: n, rows of the product.
        sketch: checks the product; dropped afterwards.
        file: shared with the other hints of the job.
        offset: where in it the product lies: `HINT_PLANES`, one after the other.
    """

    seed: PublicSeed
    operand_rows: int
    rows: int
    sketch: Sketch | None
    file: IO[bytes]
    offset: int
    _claimed: set[RowRange] = field(default_factory=set)
    _workers: set[str] = field(default_factory=set)
    _written: int = 0
    _ready: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_ready(self) -> bool:
        """Whether the product is complete and has passed its check."""
        return self._ready

    def offer(self, planes: Sequence[torch.Tensor], part: Part) -> None:
        """Takes rows of the product as a worker sent them with `part`; keeps only those that are new.

        Args:
            planes: int16 [rows, 2048], bits 16 to 31, and uint8 [rows, 2048], bits 8 to 15.
            part: which rows, and which worker's result.

        Raises:
            ResultRejected: the rows complete the product, and it is wrong. The kept rows are dropped.
        """
        with self._lock:
            fresh = [] if self._ready else _uncovered(part.rows, self._claimed)
            self._claimed.update(fresh)
            self._workers.add(part.worker)
        if not fresh:
            return
        try:
            for first, last in fresh:
                rows = slice(first - part.rows[0], last - part.rows[0])
                for plane, offset in zip(planes, self._offsets(first), strict=True):
                    self._write(plane[rows], offset)
        except OSError as error:
            _log.warning("a hint cannot be kept, workers go on computing it: %s", error)
            return
        with self._lock:
            self._written += sum(last - first for first, last in fresh)
            complete = self._written == self.rows
        if complete:
            self._check()
            self._ready = True

    def read(self, start: int, planes: Sequence[torch.Tensor]) -> None:
        """Fills `planes`, int16 [rows, 2048] and uint8 [rows, 2048], with rows from `start` on."""
        for plane, offset in zip(planes, self._offsets(start), strict=True):
            self._read(plane, offset)

    def _offsets(self, row: int) -> Iterator[int]:
        """Offsets of a row in the file, plane by plane."""
        begin = self.offset
        for plane in HINT_PLANES:
            yield begin + row * row_bytes([plane])
            begin += self.rows * row_bytes([plane])

    def _product(self) -> torch.Tensor:
        """a'·2^8 modulo 2^32: int32 [n, 2048]."""
        product = torch.empty(self.rows, SLOTS, dtype=torch.int32)
        for start in range(0, self.rows, _CHECK_ROWS_AT_ONCE):
            block = product[start : start + _CHECK_ROWS_AT_ONCE]
            planes = [torch.empty(len(block), width, dtype=dtype) for dtype, width in HINT_PLANES]
            self.read(start, planes)
            block.copy_(join_planes(*planes))
        return product

    def _check(self) -> None:
        if self.sketch is None:
            return
        mask = expand_mask(self.seed, self.operand_rows, SLOTS)
        if not self.sketch.accepts(self._product(), mask, rounding=1 << (A_SHIFT - 1)):
            with self._lock:
                workers, self._workers = sorted(self._workers), set()
                self._claimed.clear()
                self._written = 0
            raise ResultRejected(
                "the product with the public mask that this worker computed is wrong"
                if len(workers) == 1
                else "the product with the public mask that these workers computed together is wrong",
                where=", ".join(workers),
                hint="do not trust it: its weights or its arithmetic are not what they should be",
            )
        self.sketch = None

    def _write(self, plane: torch.Tensor, offset: int) -> None:
        data = plane.contiguous().numpy().data.cast("B")
        while data.nbytes:
            count = os.pwrite(self.file.fileno(), data, offset)
            data, offset = data[count:], offset + count

    def _read(self, plane: torch.Tensor, offset: int) -> None:
        view = plane.numpy().data.cast("B")
        while view.nbytes:
            count = os.preadv(self.file.fileno(), [view], offset)
            if count == 0:
                raise WireError("a hint ends before its last row", hint="the disk may be damaged")
            view, offset = view[count:], offset + count


class HintStore:
    """The hints of one job.

    Args:
        plan: the job's products.
        sketches: from `sketches_of`, for every group.
        directory: where the file goes; it needs `hint_bytes(plan)` bytes.
    """

    def __init__(self, plan: Plan, sketches: Mapping[ProductKey, Sketch], directory: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - see close()
        root = PublicSeed.fresh()
        self._hints: dict[ProductKey, Hint] = {}
        offset = 0
        for product in products_of(plan):
            self._hints[product.key] = Hint(
                seed=_derive(root, product),
                operand_rows=product.k,
                rows=product.n,
                sketch=sketches[product.key],
                file=self._file,
                offset=offset,
            )
            offset += product.n * ROW_BYTES

    def hint(self, product: Product) -> Hint:
        """The hint of one product."""
        return self._hints[product.key]

    def close(self) -> None:
        """Gives the disk space back."""
        self._file.close()


def _uncovered(rows: RowRange, covered: Iterable[RowRange]) -> list[RowRange]:
    """`rows` without the ranges that are `covered`."""
    left = [rows]
    for start, stop in covered:
        halves = ((a, min(b, start), max(a, stop), b) for a, b in left)
        left = [half for a, b, c, d in halves for half in ((a, b), (c, d)) if half[0] < half[1]]
    return left


def _derive(root: PublicSeed, product: Product) -> PublicSeed:
    """A mask seed of its own for every product. Public, as the root is."""
    text = f"{product.direction}\0{product.group.name}".encode()
    return PublicSeed(
        hashlib.blake2b(text, key=root.value, digest_size=32, person=b"hetrain.hint.v1").digest()
    )
