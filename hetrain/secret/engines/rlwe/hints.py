"""Hints: products H = W·â mod q with public masks, one for each group and direction, kept in the cache.

Masks are fixed for each client and matrix, and every ciphertext has a secret of its own (LWE with a shared
public matrix, as in SimplePIR, ePrint 2022/949). So H is computed once, by the workers; the client verifies
it exactly over Z_q, keeps it, and every later job on the same matrix uses it. All rings share it: a mask is
2048 words for each feature, however they are cut into polynomials.

A hint is a file of its own: a first line of JSON with what it is and the SHA-256 of the rest, filled up to
4096 bytes, then H as int32 [⌈n/16⌉, 2048, 16]. A file appears under its name only when it is complete, so
that jobs can share the directory. Hints are public.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import torch

from hetrain.public.disk import cache_error, cache_errors
from hetrain.public.errors import StorageError, UsageError
from hetrain.public.lattice.header import RlweHeader
from hetrain.public.lattice.masks import SEED_BYTES, PublicSeed
from hetrain.public.lattice.parameters import SLOTS, parameters_for
from hetrain.public.lattice.result_format import hint_bytes, read_hint
from hetrain.public.lattice.ring import LANES, MODULUS
from hetrain.public.lattice.uniform_masks import MaskBlocks
from hetrain.public.model.files import cache_directory
from hetrain.public.protocol.plan import Plan
from hetrain.public.protocol.product import Operand, Part, Product, products_of
from hetrain.public.system import available_cores
from hetrain.public.workspace import workspace
from hetrain.secret.verification.rows import FieldRows, field_product

HINTS = "hints"
"""Their directory in the cache."""
_HEAD_BYTES = 4096
_SPARE_BYTES = 1 << 30
_BLOCKS_AT_ONCE = 16
_LOCK_POLL_S = 0.2


def hint_bytes_of(plan: Plan) -> int:
    """Bytes on disk that all hints of a plan take."""
    return _file_bytes(products_of(plan))


@dataclass(frozen=True)
class Hint:
    """One product with a mask, in a file that has been checked.

    Attributes:
        seed: expands to the mask.
        path: of the file.
        rows: n, of W.
    """

    seed: PublicSeed
    path: Path
    rows: int

    def mapped(self) -> torch.Tensor:
        """H, int32 [⌈n/16⌉, 2048, 16], where the system caches the file: copies took a tenth of the time.

        What is written to it stays in this process.

        Raises:
            UsageError: the file was removed or cut meanwhile.
        """
        try:
            # One that is cut while it is in use ends the process (SIGBUS); nothing of hetrain cuts hints.
            with self.path.open("rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if len(content) != _HEAD_BYTES + hint_bytes(self.rows):
                raise OSError(f"it has {len(content)} bytes")
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise UsageError(
                f"a hint cannot be read: {error}",
                where=str(self.path),
                hint="leave the cache alone while a job runs, and start the job again",
            ) from error
        return torch.frombuffer(content, dtype=torch.int32, offset=_HEAD_BYTES).view(-1, SLOTS, LANES)


class HintStore:
    """The hints of one client, in a directory that all its jobs share.

    Args:
        directory: made if it is missing; holds the client's mask seed, too.

    Raises:
        UsageError: the directory cannot be used.
        StorageError: its disk is full.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with cache_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            self._root = _client_seed(directory / "seed")
        self._checked: set[Path] = set()

    def hint(self, product: Product) -> Hint:
        """The hint of one product, which may be missing still."""
        text = f"{product.direction}\0{product.group.digest}".encode()
        seed = hashlib.blake2b(text, key=self._root, digest_size=SEED_BYTES, person=b"hetrain.hint.v2")
        name = f"{product.group.digest[:32]}-{product.direction}.hint"
        return Hint(PublicSeed(seed.digest()), self.directory / name, product.n)

    def missing(self, plan: Plan) -> list[Product]:
        """The products of a plan without a hint that is whole and this client's own; others are removed."""
        products = list(products_of(plan))
        with ThreadPoolExecutor(available_cores(), thread_name_prefix="hints") as pool:
            found = pool.map(self._is_whole, products)
            return [product for product, is_whole in zip(products, found, strict=True) if not is_whole]

    def require_room(self, products: Sequence[Product]) -> None:
        """Raises `StorageError` unless the disk has room for the hints of `products`."""
        needed = _file_bytes(products)
        with cache_errors(self.directory):
            status = os.statvfs(self.directory)
        free = status.f_bavail * status.f_frsize
        if free < needed + _SPARE_BYTES:
            raise StorageError(
                f"hints of this model take {needed / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are free, "
                f"of which {_SPARE_BYTES / 1e9:.1f} GB must stay so",
                where=str(self.directory),
                hint="make room, or set HETRAIN_CACHE to a directory on a larger disk",
            )

    def keep(self, product: Product, blocks: Sequence[torch.Tensor]) -> None:
        """Keeps a verified hint.

        Args:
            product: whose.
            blocks: int32 [·, 2048, 16], which together are H.

        Raises:
            StorageError: the disk is full. No part of it is left.
            UsageError: the cache cannot be written otherwise.
        """
        hint = self.hint(product)
        digest = hashlib.sha256()
        for each in blocks:
            digest.update(each.numpy().data.cast("B"))
        head = json.dumps(_head(product, hint) | {"sha256": digest.hexdigest()}) + "\n"
        with cache_errors(hint.path), _appearing(hint.path) as file:
            file.write(head.encode().ljust(_HEAD_BYTES, b"\0"))
            for each in blocks:
                file.write(each.numpy().data.cast("B"))
        self._checked.add(hint.path)

    @contextmanager
    def locked(self, plan: Plan, on_wait: Callable[[], object]) -> Iterator[None]:
        """Keeps other jobs from making hints of the same matrices meanwhile; calls `on_wait` if one does."""
        matrices = hashlib.sha256("".join(group.digest for group in plan.groups).encode()).hexdigest()
        path = self.directory / f"{matrices[:32]}.lock"
        try:
            file = path.open("w")
        except OSError as error:
            raise cache_error(error, path) from error
        with file:
            waited = False
            while not _lock(file):
                if not waited:
                    on_wait()
                waited = True
                time.sleep(_LOCK_POLL_S)
            yield  # the lock ends with the file

    def _is_whole(self, product: Product) -> bool:
        hint = self.hint(product)
        if hint.path in self._checked:
            return True
        try:
            with hint.path.open("rb") as file:
                head = json.loads(file.read(_HEAD_BYTES).rstrip(b"\0"))
                expected = _head(product, hint) | {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        except FileNotFoundError:
            return False
        except (OSError, ValueError, RecursionError):
            head, expected = {}, None
        if head != expected:
            with suppress(OSError):
                hint.path.unlink()
            return False
        self._checked.add(hint.path)
        return True


def client_hints() -> HintStore:
    """The store in the cache of this user. Raises `UsageError` when it cannot be used."""
    return HintStore(cache_directory() / HINTS)


@dataclass(frozen=True)
class HintClaim:
    """H must be W·â mod q for the mask of `seed`: see `hetrain.secret.verification.parts.Claim`."""

    product: Product
    seed: PublicSeed
    weights: Callable[[Product], torch.Tensor]

    def read(self, part: Part) -> torch.Tensor:
        """H of the part's rows, int32 [blocks, 2048, 16]."""
        return read_hint(part.data, part.n, where=str(self.product))

    def rows(self) -> FieldRows:
        """Three uniform rows over Z_q."""
        return self.rows_for(self.weights(self.product))

    def rows_for(self, matrix: torch.Tensor) -> FieldRows:
        """Three uniform rows over Z_q for a range of W."""
        return FieldRows.fresh(matrix)

    def holds(self, rows: FieldRows, results: Sequence[torch.Tensor]) -> bool:
        """Whether r·H = (r·W)·â mod q at every point, and H lies in 0..q−1."""
        if any(int(each.min()) < 0 or int(each.max()) >= MODULUS for each in results):
            return False
        claimed = _weighted(rows.values, (block for each in results for block in each.split(_BLOCKS_AT_ONCE)))
        expected = _weighted(rows.image, _mask_blocks(self.seed, self.product.k))
        return torch.equal(claimed, expected)


def hint_operand(product: Product, seed: PublicSeed) -> Operand:
    """Asks for H: the mask's seed, which workers expand."""
    header = RlweHeader(parameters=parameters_for(SLOTS).name, operand="mask_seed")
    payload = [memoryview(bytearray(seed.value))]
    return Operand(header.to_wire(), payload, result_bytes=hint_bytes(product.n), row_step=LANES)


def _weighted(rows: torch.Tensor, blocks: Iterator[torch.Tensor]) -> torch.Tensor:
    """Σ_k rows[:, k]·block[k // 16, :, k % 16] mod q: int64 [3, 2048]. At most 256 features a block: 2^53."""
    total = torch.zeros(len(rows), SLOTS, dtype=torch.int64)
    first = 0
    for block in blocks:
        width = min(len(block) * LANES, rows.shape[1] - first)
        words = block.transpose(0, 1).reshape(SLOTS, -1)[:, :width].to(torch.float64)
        total += field_product(rows[:, first : first + width], partial(torch.matmul, other=words.t()))
        first += width
    return total % MODULUS


def _mask_blocks(seed: PublicSeed, features: int) -> Iterator[torch.Tensor]:
    masks = MaskBlocks(seed)
    count = -(-features // LANES)
    for first in range(0, count, _BLOCKS_AT_ONCE):
        out = workspace("masks", (min(_BLOCKS_AT_ONCE, count - first), SLOTS, LANES), torch.int32)
        masks.fill(out, first)
        yield out


def _file_bytes(products: Iterable[Product]) -> int:
    return sum(_HEAD_BYTES + hint_bytes(product.n) for product in products)


def _head(product: Product, hint: Hint) -> dict[str, object]:
    return {
        "hetrain": "hint",
        "version": 2,
        "seed": hint.seed.value.hex(),
        "matrix": product.group.digest,
        "direction": product.direction,
        "rows": product.n,
    }


def _client_seed(path: Path) -> bytes:
    """The client's own 256 bits, drawn at the first call. Public, as masks are."""
    with suppress(FileExistsError), _appearing(path, replace=False) as file:
        file.write(secrets.token_hex(SEED_BYTES).encode())
    try:
        value = bytes.fromhex(path.read_text())
    except ValueError:
        value = b""
    if len(value) != SEED_BYTES:
        raise UsageError(
            f"the seed of this client's masks is damaged: {len(value)} bytes, not {SEED_BYTES}",
            where=str(path),
            hint="delete it: hints are made again",
        )
    return value


@contextmanager
def _appearing(path: Path, *, replace: bool = True) -> Iterator[IO[bytes]]:
    """A file that gets its name when the block has ended well. Raises `FileExistsError` unless `replace`."""
    if not replace and path.exists():
        raise FileExistsError(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        try:
            yield file
            file.flush()
            if replace:
                os.replace(file.name, path)
            else:
                os.link(file.name, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(file.name)


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
