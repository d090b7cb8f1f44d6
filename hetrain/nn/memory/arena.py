"""Memory for values that all live until the same moment; what is more than a limit waits on the disk."""

from __future__ import annotations

import logging
import mmap
from contextlib import suppress
from dataclasses import dataclass

import torch

from hetrain.nn.memory.encrypted_file import EncryptedFile, Extent
from hetrain.public.disk import reason_of

_log = logging.getLogger(__name__)

CHUNK = 1 << 23
_BYTES = torch.float16.itemsize


@dataclass(eq=False)
class _Chunk:
    """Values side by side, the first `used` of a buffer; without one they lie in `extent` of the file."""

    buffer: torch.Tensor | None
    used: int = 0
    extent: Extent | None = None
    last_use: int = 0


@dataclass(frozen=True, eq=False)
class Room:
    """Values [begin, end) of a chunk."""

    chunk: _Chunk
    begin: int
    end: int


class Arena:
    """Room for float16 values until `reset`, in chunks, of which the last used stay in memory.

    In the heap, values would lie between short-lived buffers and keep it from shrinking.
    A backward pass asks for them in the reverse order of the forward pass, so the last used are needed first.
    Not thread-safe.

    Args:
        device: of the values.
        limit: bytes in memory, on the CPU; None: all. A chunk of 16 MB, or one larger value, is always there.
            Where the disk is full, values stay in memory.
    """

    def __init__(self, device: torch.device, limit: int | None = None) -> None:
        self._device = device
        self._limit = limit if device.type == "cpu" else None
        self._file = EncryptedFile()
        self._chunks: list[_Chunk] = []
        self._free: list[torch.Tensor] = []
        self._held = self._end = self._uses = 0
        self._is_full = self._has_warned = False

    def take(self, count: int) -> Room:
        """Room for `count` values, uninitialised, in the first chunk that has it.

        Large values leave room at the ends of chunks, which small ones fill.
        """
        chunk = next((each for each in self._chunks if _has_room(each, count)), None)
        if chunk is None:
            chunk = _Chunk(self._buffer(max(count, CHUNK)))
            self._chunks.append(chunk)
        begin, chunk.used = chunk.used, chunk.used + count
        return Room(chunk, begin, chunk.used)

    def at(self, room: Room) -> torch.Tensor:
        """The values [count] there, to read, and before the next `take` to write. Gone with the next `at`."""
        chunk = room.chunk
        if chunk.buffer is None:
            assert chunk.extent is not None
            buffer = self._buffer(chunk.used)
            self._file.read(chunk.extent, buffer[: chunk.used].numpy().data.cast("B"))
            chunk.buffer = buffer
        self._uses += 1
        chunk.last_use = self._uses
        return chunk.buffer[room.begin : room.end]

    @property
    def used(self) -> int:
        """Values in use."""
        return sum(chunk.used for chunk in self._chunks)

    def reset(self) -> None:
        """Gives all of it to the next values."""
        self._free += [chunk.buffer for chunk in self._chunks if chunk.buffer is not None]
        self._chunks.clear()
        self._end = 0
        self._is_full = False

    def _buffer(self, count: int) -> torch.Tensor:
        """A free buffer, or a new one once others have made way for it."""
        while True:
            fitting = [index for index, buffer in enumerate(self._free) if len(buffer) >= count]
            if fitting:
                return self._free.pop(min(fitting, key=lambda index: len(self._free[index])))
            if self._limit is None or self._held + count * _BYTES <= self._limit or not self._make_way():
                break
        self._held += count * _BYTES
        if self._device.type == "cpu":
            return _mapped(count)
        return torch.empty(count, dtype=torch.float16, device=self._device)

    def _make_way(self) -> bool:
        """Gives up a free buffer, or else frees the one of the chunk whose last use was first.

        Returns whether there was one.
        """
        if self._free:
            self._held -= len(self._free.pop()) * _BYTES
            return True
        there = [chunk for chunk in self._chunks if chunk.buffer is not None]
        if not there or self._is_full:
            return False
        try:
            self._leave(min(there, key=lambda chunk: chunk.last_use))
        except OSError as error:
            self._is_full = True
            if not self._has_warned:
                _log.warning("activations stay in memory, beyond `activation_memory`: %s", reason_of(error))
            self._has_warned = True
        return not self._is_full

    def _leave(self, chunk: _Chunk) -> None:
        """Writes a chunk to the disk, unless it lies there, and frees its buffer. Raises `OSError`."""
        assert chunk.buffer is not None
        if chunk.extent is None:
            chunk.extent = self._file.write(chunk.buffer[: chunk.used].numpy().data.cast("B"), self._end)
            self._end += chunk.extent.size
        self._free.append(chunk.buffer)
        chunk.buffer = None


def _has_room(chunk: _Chunk, count: int) -> bool:
    return chunk.buffer is not None and chunk.extent is None and chunk.used + count <= len(chunk.buffer)


def _mapped(count: int) -> torch.Tensor:
    """Memory outside the heap, in large pages where the kernel grants them."""
    memory = mmap.mmap(-1, count * _BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # a kernel, or a system, without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float16)
