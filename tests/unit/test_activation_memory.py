"""Activations beyond a limit of memory: they wait on the disk, unreadable, and come back to the bit."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hetrain.nn.memory import arena as arena_module
from hetrain.nn.memory import saved_tensors as saved_module
from hetrain.nn.memory.arena import Arena, Room
from hetrain.nn.memory.encrypted_file import EncryptedFile
from hetrain.nn.replica import Replica
from hetrain.public.errors import StorageError
from hetrain.train.step import run_step
from tests.harness.small_disk import SmallDisk, small_disk
from tests.harness.split_model import FAMILIES, SplitHarness, packed, rows, save_model

CHUNK = 1 << 12
LIMIT = 4 * CHUNK * torch.float16.itemsize
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of the test's own, and small chunks."""
    monkeypatch.setattr(arena_module, "CHUNK", CHUNK)
    monkeypatch.setenv("HETRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        monkeypatch.setenv("HETRAIN_CACHE", str(disk.path))
        yield disk


def scratch_files(directory: Path) -> list[Path]:
    """The files that this process has open there, whether or not they have a name."""
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return [link for link in links if link.exists() and os.readlink(link).startswith(str(directory))]


def fill(arena: Arena, sizes: list[int]) -> list[tuple[Room, torch.Tensor]]:
    """Values of these sizes in the arena, and the same beside it."""
    kept = []
    for size in sizes:
        room, values = arena.take(size), torch.randn(size).half()
        arena.at(room).copy_(values)
        kept.append((room, values))
    return kept


def resident(kept: list[tuple[Room, torch.Tensor]]) -> int:
    """Bytes of the buffers that hold some of these values."""
    places = {
        room.chunk.buffer.data_ptr(): room.chunk.buffer for room, _ in kept if room.chunk.buffer is not None
    }
    return sum(buffer.nbytes for buffer in places.values())


def test_values_come_back_in_any_order_and_few_are_in_memory() -> None:
    order, arena = random.Random(1), Arena(CPU, LIMIT)
    for _ in range(3):  # the file and the buffers are used again
        sizes = [order.choice([1, 100, CHUNK // 2, CHUNK, 2 * CHUNK + 1]) for _ in range(60)]
        kept = fill(arena, sizes)
        assert arena.used == sum(sizes)
        assert resident(kept) <= LIMIT
        for room, values in [*reversed(kept), *order.sample(kept, len(kept))]:
            assert torch.equal(arena.at(room), values)
            assert resident(kept) <= LIMIT
        arena.reset()
        assert arena.used == 0


def test_a_value_larger_than_the_limit_is_alone_in_memory() -> None:
    arena = Arena(CPU, 0)
    kept = fill(arena, [CHUNK, 5 * CHUNK, 10])
    for room, values in kept:
        assert torch.equal(arena.at(room), values)
        assert sum(other.chunk.buffer is not None for other, _ in kept) == 1


def test_without_a_limit_nothing_is_written(cache: Path) -> None:
    fill(Arena(CPU), [CHUNK] * 20)
    assert not cache.exists()


def test_the_disk_has_no_name_and_no_value(cache: Path) -> None:
    arena = Arena(CPU, LIMIT)
    kept = fill(arena, [CHUNK] * 20)
    (file,) = scratch_files(cache)
    assert not list(cache.iterdir())
    written = file.read_bytes()
    assert len(written) >= 16 * CHUNK * 2
    assert not any(values.numpy().tobytes()[:16] in written for _, values in kept)
    del arena, kept
    assert not scratch_files(cache)


@pytest.mark.parametrize("damage", ["changed", "cut"])
def test_what_the_disk_has_changed_is_refused(damage: str, cache: Path) -> None:
    arena = Arena(CPU, LIMIT)
    kept = fill(arena, [CHUNK] * 20)
    (file,) = scratch_files(cache)
    with file.open("r+b") as opened:
        if damage == "cut":
            opened.truncate(100)
        else:
            opened.seek(7)
            byte = opened.read(1)
            opened.seek(7)
            opened.write(bytes([byte[0] ^ 1]))
    with pytest.raises(StorageError, match="scratch file") as error:
        arena.at(kept[0][0])
    assert "HETRAIN_CACHE" in error.value.hint


def test_two_writes_to_one_place_have_nothing_in_common() -> None:
    """The same bytes at the same offset: another nonce, another ciphertext."""
    file, plain = EncryptedFile(), bytes(range(256)) * 16
    first, second = bytearray(plain), bytearray(plain)
    extents = [file.write(memoryview(values), 0) for values in (first, second)]
    assert plain not in (first, second)
    assert sum(a == b for a, b in zip(first, second, strict=True)) < len(plain) / 64
    with pytest.raises(StorageError):
        file.read(extents[0], memoryview(bytearray(len(plain))))
    back = bytearray(len(plain))
    file.read(extents[1], memoryview(back))
    assert back == plain


def test_on_a_full_disk_values_stay_in_memory(disk: SmallDisk, caplog: pytest.LogCaptureFixture) -> None:
    disk.fill(leave=3 * CHUNK)
    arena = Arena(CPU, LIMIT)
    kept = fill(arena, [CHUNK] * 20)
    assert resident(kept) > LIMIT
    for room, values in kept:
        assert torch.equal(arena.at(room), values)
    assert caplog.text.count("activations stay in memory") == 1
    arena.reset()
    disk.free()
    kept = fill(arena, [CHUNK] * 20)
    assert all(torch.equal(arena.at(room), values) for room, values in kept)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "phi3"])
def test_gradients_are_the_same_to_the_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_module, "SMALLEST", 64)
    save_model(FAMILIES[name], tmp_path)
    harness = SplitHarness(tmp_path)
    expected, found = (
        run_step(
            Replica(harness.split, harness.model, harness.channel, harness.sealer, activation_memory=limit),
            packed(rows()),
            harness.snapshot(),
            seed=0,
        )
        for limit in (None, 0)
    )
    assert expected.gradients is not None
    assert found.gradients is not None
    assert found.summed_loss == expected.summed_loss
    assert all(torch.equal(found.gradients[each], values) for each, values in expected.gradients.items())
