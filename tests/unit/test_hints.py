"""Hints: made once for each client and matrix, verified exactly, and never a secret for two messages."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hetrain.nn.remote import ProductStats, RemoteMatmul
from hetrain.public.errors import ResultRejected, StorageError, UsageError
from hetrain.public.lattice.parameters import SLOTS
from hetrain.public.lattice.result_format import hint_bytes
from hetrain.public.lattice.ring import LANES, MODULUS
from hetrain.public.lattice.uniform_masks import expand_masks
from hetrain.public.protocol.product import Part, products_of
from hetrain.secret.engines.rlwe import seal as rlwe
from hetrain.secret.engines.rlwe.hints import HintClaim, HintStore, hint_bytes_of, hint_operand
from hetrain.secret.engines.rlwe.torch_ring import TorchRing
from hetrain.secret.verification.parts import PartsCheck
from hetrain.train.hints import ignore_progress, make_hints
from tests.harness.engine import EngineHarness, open_checked

SHAPE = (70, 29)


@pytest.fixture
def harness(tmp_path: Path) -> EngineHarness:
    generator = torch.Generator().manual_seed(4)
    weights = {name: torch.randn(SHAPE, generator=generator) for name in ("one", "other")}
    return EngineHarness("rlwe", weights, tmp_path / "model")


def made_again(harness: EngineHarness, store: HintStore) -> int:
    """How many hints a job that uses `store` has made."""
    counted: list[int] = []
    make_hints(
        store, harness.plan, harness.channel, harness.weights, lambda done, total: counted.append(total)
    )
    return counted[-1] if counted else 0


def files(store: HintStore) -> list[Path]:
    return sorted(store.directory.glob("*.hint"))


def test_a_hint_is_the_product_with_the_mask(harness: EngineHarness) -> None:
    for product in products_of(harness.plan):
        hint = harness.hints.hint(product)
        got = hint.mapped()
        assert got.shape == (-(-product.n // LANES), SLOTS, LANES)
        masks = expand_masks(hint.seed, product.k).to(torch.int64).transpose(0, 1).reshape(SLOTS, -1)
        expected = masks[:, : product.k] @ harness.weights(product).to(torch.int64).t() % MODULUS
        assert torch.equal(got.transpose(0, 1).reshape(SLOTS, -1)[:, : product.n].to(torch.int64), expected)


def test_a_second_job_makes_none(harness: EngineHarness) -> None:
    assert made_again(harness, HintStore(harness.hints.directory)) == 0
    assert len(files(harness.hints)) == 4
    assert sum(path.stat().st_size for path in files(harness.hints)) == hint_bytes_of(harness.plan)


@pytest.mark.parametrize("damage", ["cut", "flipped", "head", "empty", "text", "renamed"])
def test_a_hint_that_is_not_whole_or_not_its_own_is_made_again(harness: EngineHarness, damage: str) -> None:
    first, second = files(harness.hints)[:2]
    data = first.read_bytes()
    match damage:
        case "cut":
            first.write_bytes(data[:-1])
        case "flipped":
            first.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
        case "head":
            first.write_bytes(data.replace(b'"rows": ', b'"rows":1', 1))
        case "empty":
            first.write_bytes(b"")
        case "text":
            first.write_bytes(b"not JSON\xff" * 1000)
        case "renamed":
            first.write_bytes(second.read_bytes())
    assert made_again(harness, HintStore(harness.hints.directory)) == 1
    assert first.read_bytes() == data
    assert len(files(harness.hints)) == 4


def test_another_clients_hint_is_made_again(harness: EngineHarness, tmp_path: Path) -> None:
    other = HintStore(tmp_path / "other")
    for path in files(harness.hints):
        (other.directory / path.name).write_bytes(path.read_bytes())
    assert made_again(harness, other) == 4
    assert all(
        (other.directory / path.name).read_bytes() != path.read_bytes() for path in files(harness.hints)
    )


def test_seeds_differ_between_products_and_clients_and_last(harness: EngineHarness, tmp_path: Path) -> None:
    stores = [HintStore(tmp_path / name) for name in ("a", "b")]
    seeds = {store.hint(product).seed.value for store in stores for product in products_of(harness.plan)}
    assert len(seeds) == 8
    again = HintStore(tmp_path / "a")
    assert all(again.hint(p).seed == stores[0].hint(p).seed for p in products_of(harness.plan))


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(UsageError, match="cannot be used") as error:
        HintStore(tmp_path / "file")
    assert "HETRAIN_CACHE" in error.value.hint
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "seed").write_text("00" * 31)
    with pytest.raises(UsageError, match="31 bytes, not 32"):
        HintStore(broken)


def test_a_full_disk_is_said_with_both_figures(
    harness: EngineHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = os.statvfs(tmp_path)
    store = HintStore(tmp_path / "empty")
    monkeypatch.setattr(
        os, "statvfs", lambda path: os.statvfs_result((*found[:4], (1 << 30) // found.f_frsize, *found[5:]))
    )
    with pytest.raises(StorageError, match=r"take \d+\.\d GB of disk, and 1\.1 GB are free") as error:
        made_again(harness, store)
    assert error.value.where == str(store.directory)
    assert not files(store)


def test_what_cannot_be_written_leaves_nothing(
    harness: EngineHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = HintStore(tmp_path / "empty")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="No space left"):
        made_again(harness, store)
    assert [path.name for path in store.directory.iterdir() if path.suffix != ".lock"] == ["seed"]


def test_a_hint_that_vanishes_is_said(harness: EngineHarness) -> None:
    sealed = harness.seal("one", "forward", torch.randn(5, 29))
    parts = harness.answer("one", "forward", sealed)
    for path in files(harness.hints):
        path.unlink()
    with pytest.raises(UsageError, match="cannot be read") as error:
        open_checked(sealed, parts)
    assert "start the job again" in error.value.hint


def hint_parts(harness: EngineHarness, cuts: list[tuple[int, int]], workers: str) -> Iterator[Part]:
    product = harness.product("one", "forward")
    operand = hint_operand(product, harness.hints.hint(product).seed)
    payload, header = b"".join(operand.payload), operand.header
    sealed = harness.seal("one", "forward", torch.randn(1, 29))
    for part, worker in zip(
        harness.answer("one", "forward", sealed, cuts, payload, header), workers, strict=True
    ):
        yield Part(part.rows, memoryview(bytearray(part.data)), worker)


@pytest.mark.parametrize("place", [0, 12345, -1])
def test_a_wrong_word_is_found_and_its_worker_named(harness: EngineHarness, place: int) -> None:
    product = harness.product("one", "forward")
    claim = HintClaim(product, harness.hints.hint(product).seed, harness.weights)
    check = PartsCheck(product, claim, harness.weights)
    first, second = hint_parts(harness, [(0, 64), (64, 70)], "ab")
    words = torch.frombuffer(first.data, dtype=torch.int32)
    right = int(words[place])
    words[place] = (right + 1) % MODULUS
    check.add(first)
    with pytest.raises(ResultRejected) as error:
        check.add(second)
    assert error.value.workers == ("a",)
    words[place] = right
    check.add(first)
    assert [each.rows for each in check.results()] == [(0, 64), (64, 70)]
    assert sum(each.values.nbytes for each in check.results()) == hint_bytes(70)


def _make(directory: Path, model: Path, made: list[int]) -> None:
    generator = torch.Generator().manual_seed(4)
    weights = {name: torch.randn(SHAPE, generator=generator) for name in ("one", "other")}
    made.append(made_again(EngineHarness("rlwe", weights, model), HintStore(directory)))


def test_processes_share_a_directory(harness: EngineHarness, tmp_path: Path) -> None:
    """Two jobs that start at once, on copies of one model: each hint is made once."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        made = manager.list()
        jobs = [
            context.Process(target=_make, args=(tmp_path / "shared", tmp_path / name, made)) for name in "ab"
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        assert sorted(made) == [0, 4]
    store = HintStore(tmp_path / "shared")
    assert store.missing(harness.plan) == []


def test_two_messages_never_meet_one_mask_and_one_secret(
    harness: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many operands of one job, from several threads: the mask repeats, the secret never does."""
    seen: list[tuple[bytes, bytes]] = []
    encrypt = rlwe.encrypt

    def watch(message, hint, secret, parameters):  # type: ignore[no-untyped-def]
        seen.append((hint.seed.value, secret.points.numpy().tobytes()))
        return encrypt(message, hint, secret, parameters)

    monkeypatch.setattr(rlwe, "ring_kernels", TorchRing)  # whose secrets can be asked
    monkeypatch.setattr(rlwe, "encrypt", watch)
    x = torch.randn(5, 29)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: harness.multiply("one", "forward", x), range(12)))
        list(pool.map(lambda _: harness.seal("other", "forward", x), range(12)))
    assert len({mask for mask, _ in seen}) == 2, "operands of one product share their mask"
    assert len({secret for _, secret in seen}) == len(seen) == 24


def test_no_way_leads_to_a_second_message_under_a_secret(harness: EngineHarness) -> None:
    """Neither what is sealed nor what opens it has anything that encrypts, or gives its secret away."""
    sealed = harness.seal("one", "forward", torch.randn(5, 29))
    for holder in (sealed, sealed.opening, harness.sealer):
        for name in dir(holder):
            assert not name.startswith(("encrypt", "reseal")), name
    with pytest.raises((AttributeError, TypeError)):
        sealed.opening.secret = None  # type: ignore[misc]


def test_blocks_of_a_large_micro_batch_share_the_mask_but_no_secret(harness: EngineHarness) -> None:
    """5000 tokens are three ciphertexts."""
    matmul = RemoteMatmul(harness.channel, harness.sealer, ProductStats())
    x = torch.randn(5000, 29)
    y = matmul.multiply(harness.product("one", "forward"), x)
    for start in range(0, 5000, SLOTS):
        part = slice(start, start + SLOTS)
        assert not harness.excess("one", "forward", x[part], y[part]).any()


def test_progress_is_told(harness: EngineHarness, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    store = HintStore(tmp_path / "empty")
    make_hints(
        store, harness.plan, harness.channel, harness.weights, lambda *progress: calls.append(progress)
    )
    assert calls == [(done, 4) for done in range(5)]
    make_hints(store, harness.plan, harness.channel, harness.weights, ignore_progress)
