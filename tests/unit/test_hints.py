"""Hints: the same products, one mask for a whole job, and never one (mask, secret) pair for two messages."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hetrain.nn.remote import ProductStats, RemoteMatmul
from hetrain.public.errors import ResultRejected, UsageError
from hetrain.public.lattice.parameters import SLOTS
from hetrain.secret.engine import ENGINES
from hetrain.secret.engines.rlwe import seal as rlwe
from hetrain.secret.engines.rlwe.hints import ROW_BYTES, hint_bytes
from hetrain.secret.engines.rlwe.kernels import TorchKernels
from hetrain.secret.verification import Sketch
from hetrain.train.session import open_hints, wants_hints
from tests.harness.engine import EngineHarness, open_checked
from worker_gpu.kernels import reference

SHAPE = (37, 29)


@pytest.fixture
def harness(tmp_path: Path) -> EngineHarness:
    generator = torch.Generator().manual_seed(4)
    weights = {name: torch.randn(SHAPE, generator=generator) for name in ("one", "other")}
    return EngineHarness("rlwe", weights, tmp_path / "model", hints=True)


def test_from_the_second_product_on_only_b_travels(harness: EngineHarness) -> None:
    x = torch.randn(300, 29)
    first = harness.seal("one", "forward", x)
    full = harness.answer("one", "forward", first)
    assert "mask_seed" in first.operand.header
    assert full[0].data.nbytes == 37 * (2 * 512 + 3 * SLOTS)
    expected = open_checked(first, full)
    second = harness.seal("one", "forward", x)
    assert second.operand.header == {"parameters": "rlwe-512x4", "result": "b"}
    short = harness.answer("one", "forward", second)
    assert short[0].data.nbytes == 37 * 2 * 512
    y = open_checked(second, short)
    assert not harness.excess("one", "forward", x, expected).any()
    assert not harness.excess("one", "forward", x, y).any()
    # What is sealed for another direction or matrix knows nothing of it yet.
    for name, direction, k in (("one", "backward", 37), ("other", "forward", 29)):
        assert "mask_seed" in harness.seal(name, direction, torch.randn(3, k)).operand.header  # type: ignore[arg-type]


def test_rings_of_every_degree_share_a_hint(harness: EngineHarness) -> None:
    harness.multiply("one", "backward", torch.randn(9, 37))
    for tokens in (1, 256, 257, 1000, 2048):
        x = torch.randn(tokens, 37)
        assert harness.seal("one", "backward", x).operand.header["result"] == "b"
        assert not harness.excess("one", "backward", x, harness.multiply("one", "backward", x)).any()


def test_ranges_of_rows_complete_a_hint_in_any_order(harness: EngineHarness) -> None:
    x = torch.randn(20, 29)
    for rows in ([(0, 13)], [(20, 37)], [(0, 13), (13, 20)]):
        sealed = harness.seal("one", "forward", x)
        assert "mask_seed" in sealed.operand.header
        open_checked(sealed, harness.answer("one", "forward", sealed, rows))
    rows = [(30, 37), (0, 30)]
    sealed = harness.seal("one", "forward", x)
    assert sealed.operand.header["result"] == "b"
    y = open_checked(sealed, harness.answer("one", "forward", sealed, rows))
    back = torch.cat([y[:, 7:], y[:, :7]], dim=1)
    assert not harness.excess("one", "forward", x, back).any()


def test_two_messages_never_meet_one_mask_and_one_secret(
    harness: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many operands of one job, from several threads: the mask repeats, the secret never does."""
    seen: list[tuple[bytes, bytes]] = []
    encrypt = rlwe.encrypt

    def watch(x, scales, x_max, seed, secret, parameters):  # type: ignore[no-untyped-def]
        one = torch.zeros(1, parameters.dimension, dtype=torch.int32)
        one[0, 0] = 1
        seen.append((seed.value, secret.dot(one).numpy().tobytes()))  # the secret's first polynomial
        return encrypt(x, scales, x_max, seed, secret, parameters)

    monkeypatch.setattr(rlwe, "kernels", TorchKernels)  # whose secrets can be asked
    monkeypatch.setattr(rlwe, "encrypt", watch)
    x = torch.randn(5, 29)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: harness.multiply("one", "forward", x), range(12)))
        list(pool.map(lambda _: harness.seal("other", "forward", x), range(12)))
    assert len({mask for mask, _ in seen}) == 2, "hints share a mask within a job and a product"
    assert len({secret for _, secret in seen}) == len(seen) == 24


def test_no_way_leads_to_a_second_message_under_a_secret(harness: EngineHarness) -> None:
    """Neither what is sealed nor what opens it has anything that encrypts, or gives its secret away."""
    sealed = harness.seal("one", "forward", torch.randn(5, 29))
    for holder in (sealed, sealed.opening, harness.sealer):
        for name in dir(holder):
            assert not name.startswith(("encrypt", "reseal")), name
    with pytest.raises((AttributeError, TypeError)):
        sealed.opening.secret = None  # type: ignore[misc]


def test_masks_of_different_products_and_jobs_differ(harness: EngineHarness) -> None:
    stores = [harness.new_hints(), harness.new_hints()]
    seeds = {
        store.hint(harness.product(name, direction)).seed.value  # type: ignore[union-attr]
        for store in stores
        for name in ("one", "other")
        for direction in ("forward", "backward")
    }
    assert len(seeds) == 8


@pytest.mark.parametrize(("place", "flip"), [("first", 0x01), ("last", 0x80)])
def test_a_wrong_hint_is_found_before_it_is_used(harness: EngineHarness, place: str, flip: int) -> None:
    sealed = harness.seal("one", "forward", torch.randn(5, 29))
    (part,) = harness.answer("one", "forward", sealed)
    data = bytearray(part.data)
    b_bytes, high_bytes = 37 * 2 * 256, 37 * 2 * SLOTS
    data[b_bytes + 1 if place == "first" else b_bytes + high_bytes - 1] ^= flip
    with pytest.raises(ResultRejected, match=r"public mask .* is wrong") as error:
        sealed.opening.check(replace(part, data=memoryview(data)))
    assert "do not trust" in error.value.hint
    assert error.value.where == part.worker == "worker"
    assert "mask_seed" in harness.seal("one", "forward", torch.randn(5, 29)).operand.header


def test_a_full_disk_costs_speed_only(harness: EngineHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    for _ in range(2):
        x = torch.randn(5, 29)
        assert "mask_seed" in harness.seal("one", "forward", x).operand.header
        assert not harness.excess("one", "forward", x, harness.multiply("one", "forward", x)).any()


@pytest.mark.parametrize("k", [3, 300])
@pytest.mark.parametrize("n", [1, 40, 1500])
def test_sketches_accept_products_and_nothing_else(n: int, k: int) -> None:
    w = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    x = torch.randint(-(2**31), 2**31, (k, 300), dtype=torch.int64).to(torch.int32)
    product = reference(w, x)
    sketch = Sketch.of(w)
    assert int(sketch.largest_error(product, x).max()) == 0
    rounded = (product + (1 << 7)) >> 8 << 8
    assert sketch.accepts(rounded, x, rounding=1 << 7)
    assert not sketch.accepts(rounded, x, rounding=0)
    for error in (1, -(2**31), 2**30):
        wrong = product.clone()
        wrong[n // 2, 299] += error
        assert not sketch.accepts(wrong, x, rounding=0)


def test_sketches_are_secret_and_fresh() -> None:
    w = torch.randint(-127, 128, (50, 8), dtype=torch.int8)
    one, other = Sketch.of(w), Sketch.of(w)
    assert not torch.equal(one.rows, other.rows)
    assert set(one.rows.flatten().tolist()) == {-1, 0, 1}
    assert "tensor" not in repr(one)


def test_blocks_of_a_large_micro_batch_share_the_mask_but_no_secret(harness: EngineHarness) -> None:
    """5000 tokens are three ciphertexts."""
    matmul = RemoteMatmul(harness.channel, harness.sealer, ProductStats())
    x = torch.randn(5000, 29)
    y = matmul.multiply(harness.product("one", "forward"), x)
    for start in range(0, 5000, SLOTS):
        part = slice(start, start + SLOTS)
        assert not harness.excess("one", "forward", x[part], y[part]).any()


def test_hints_are_used_where_they_pay(
    harness: EngineHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rlwe_engine, clear = ENGINES["rlwe"], ENGINES["clear"]
    assert [wants_hints(rlwe_engine, None, count) for count in (1, 3, 4, 100)] == [False, False, True, True]
    assert [wants_hints(rlwe_engine, asked, 1) for asked in (True, False)] == [True, False]
    assert not wants_hints(clear, None, 100)
    with pytest.raises(UsageError, match="no hints"):
        wants_hints(clear, True, 100)
    assert hint_bytes(harness.plan) == 2 * (37 + 29) * ROW_BYTES
    monkeypatch.setenv("HETRAIN_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("not a directory")
    assert open_hints(harness.plan, {}, required=False) is None
    with pytest.raises(UsageError, match="hints take"):
        open_hints(harness.plan, {}, required=True)
