"""The model behind `benchmarks.scaling`: its arithmetic, workers that keep to it, and what the docs quote."""

from __future__ import annotations

import pytest

from benchmarks import update_docs as documents
from benchmarks.delayed import Pace
from benchmarks.hardware import DECODERS, LLAMA_8B, ClientModel, Decoder, ProductModel, Work, WorkerModel

SMALL = Decoder(hidden=2048, ffn=4096, layers=2, heads=16, kv_heads=4, head_dim=128, vocabulary=1000)


def test_a_product_takes_what_the_formulas_say() -> None:
    worker = WorkerModel(int8_ops_per_s=2e15, int8_share=0.5, pcie_bytes_per_s=50e9, network_bits_per_s=8e9)
    product = ProductModel("gate_up", "forward", k=4096, n=28672)
    assert (product.bytes_up, product.bytes_down) == (25_165_824, 102_760_448)  # 3·K·N, 14/8·n·N
    assert product.int8_ops == 2 * 3 * 4096 * 28672 * 2048
    seconds = 127_926_272 / 1e9 + 127_926_272 / 50e9 + 6 * 4096 * 28672 * 2048 / 1e15
    assert worker.seconds(product) == pytest.approx(seconds)
    # The ring is the smallest that fits, and 64 features are packed together.
    short = ProductModel("down", "forward", k=100, n=65, tokens=300)
    assert (short.bytes_up, short.bytes_down) == (3 * 100 * 512, 2 * 112 * 512)


def test_a_decoder_has_the_published_weights_and_its_backward_mirrors_its_forward() -> None:
    # 8.03·10^9 parameters, less embedding and output layer (128256 × 4096 each) and norms.
    assert DECODERS[LLAMA_8B].weights == 8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096
    block = DECODERS[LLAMA_8B].block()
    assert [(one.k, one.n) for one in block[:4]] == [(one.n, one.k) for one in block[:3:-1]]


def test_the_client_is_limited_by_what_it_does_least_often() -> None:
    client = ClientModel(cores=10, core_s_per_coefficient=1e-8, network_bits_per_s=80e9)
    limits = client.limits(Work(bytes_up=2e9, bytes_down=5e9, coefficients=1e9, int8_ops=0))
    assert list(limits.values()) == pytest.approx([5.0, 2.0, 1.0])


def test_a_share_of_the_rows_takes_the_time_of_all() -> None:
    pace = Pace(WorkerModel(), dilation=3.0, share=16)
    product = DECODERS[LLAMA_8B].block()[0]
    small = pace.scaled(product)
    networks = pace.network_s(small.bytes_up) + pace.network_s(small.bytes_down)
    assert networks + pace.gpu_s(product) == pytest.approx(pace.seconds(product))
    assert pace.seconds(product) == pytest.approx(3 * WorkerModel().seconds(product))
    with pytest.raises(ValueError, match="cannot be shared"):
        Pace(share=1000).scaled(product)


def test_the_documentation_quotes_the_programs() -> None:
    texts = [document.read_text(encoding="utf-8") for document in documents.DOCUMENTS]
    assert all(any(f"<!-- begin: {name} -->" in text for text in texts) for name in documents.PARTS)
    assert [documents.rewritten(text) for text in texts] == texts
