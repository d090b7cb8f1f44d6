"""Workers that take as long as the model behind `benchmarks.scaling` says."""

from __future__ import annotations

from time import perf_counter

import pytest

from benchmarks import scaling
from benchmarks.delayed import Pace
from benchmarks.hardware import Decoder, WorkerModel

SMALL = Decoder(hidden=2048, ffn=4096, layers=2, heads=16, kv_heads=4, head_dim=128, vocabulary=1000)


@pytest.mark.alone
def test_real_tasks_on_delayed_workers_take_the_modelled_time() -> None:
    products = SMALL.block(256)
    pace = Pace(WorkerModel(), dilation=10.0, share=16)
    with scaling.bench(products, seconds=0.3) as bench:
        figures = bench.run(pace, encrypts=True, workers=2, in_flight=3)
        assert figures["products_per_s"] > 0
        assert figures["bytes_up_per_s"] > figures["bytes_down_per_s"] > 0
        # The workers of that pace are still there.
        begin = perf_counter()
        reply = scaling.ready_made(bench.channel, products, pace)[2]()
        assert perf_counter() - begin >= pace.seconds(products[2])
    assert reply.server_s >= pace.gpu_s(products[2])
    assert reply.bytes_up == products[2].bytes_up // 16
    assert reply.bytes_down == products[2].bytes_down // 16
