"""The client's cryptography, verification included: ``python -m benchmarks.client --json FILE``.

One operand of K features and one result of n = K rows, N = 2048, one thread, for every instruction set of
this machine. Nanoseconds of CPU time per coefficient, of which each has K·N: other processes count only by
way of the caches. Medians over rounds in which all run in turn. Operands have full size, and masks and noise
keystream are made just before the blocks that need them, as in training, but timed apart from "encrypt". The
average is the sum of all parts, divided by 2. Memory comes as in a client, in pages of 2 MB where it can.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.output import add_json_option, markdown, rounds, write
from hetrain.public.allocator import keep_freed_memory, restart_tuned
from hetrain.public.compiled import INSTRUCTION_SETS
from hetrain.public.lattice.masks import PublicSeed
from hetrain.public.lattice.parameters import SLOTS
from hetrain.public.lattice.result_format import packed_bytes
from hetrain.public.lattice.ring import LANES
from hetrain.public.lattice.uniform_masks import MaskBlocks, expand_masks
from hetrain.secret.engines.rlwe.native.ring_library import NativeRing
from hetrain.secret.engines.rlwe.torch_ring import Message, ResultScales
from hetrain.secret.randomness import SecretStream, sample_ternary

CHECK_ROWS = 16
TARGETS_NS = {"avx512": 3.0, "avx2": 6.0}
"""Of the average."""
PARTS = ("masks", "noise", "encrypt", "check_up", "unpack", "check_down", "decrypt")

Seconds = Callable[[], Mapping[str, float]]


def contestant(kernels: NativeRing, k: int, blocks: int) -> Seconds:
    """All parts over one operand of k features, `blocks` blocks of 16 at a time: the CPU seconds of each."""
    secret = kernels.spectrum(sample_ternary(SecretStream("benchmark"), SLOTS).view(1, SLOTS))
    masks, hint = torch.empty(blocks, SLOTS, LANES, dtype=torch.int32), expand_masks(PublicSeed.fresh(), k)
    keystream = torch.empty(2 * masks.numel(), dtype=torch.uint8)
    mask_blocks, noise = MaskBlocks(PublicSeed.fresh()), SecretStream("benchmark")
    message = Message(torch.randn(SLOTS, k), torch.rand(k), torch.full((SLOTS,), 1000.0), 1 << 15)
    planes, y, scales = (
        torch.zeros(3, SLOTS, k, dtype=torch.int8),
        torch.zeros(SLOTS, k),
        ResultScales(torch.rand(SLOTS), torch.rand(k)),
    )
    packed = torch.randint(0, 256, (SLOTS, packed_bytes(k)), dtype=torch.uint8)
    u = torch.zeros(SLOTS, k, dtype=torch.int16)
    rows = torch.randint(-1, 2, (CHECK_ROWS, k)).to(torch.int8)
    image = torch.randint(-10000, 10000, (CHECK_ROWS, k)).to(torch.int32)

    def run() -> Mapping[str, float]:
        spent = dict.fromkeys(PARTS, 0)

        def clock(part: str, work: Callable[..., object], *operands: object) -> None:
            begin = time.thread_time_ns()
            work(*operands)
            spent[part] += time.thread_time_ns() - begin

        for first in range(0, k, LANES * blocks):
            clock("masks", mask_blocks.fill, masks, first // LANES)
            clock("noise", noise.fill, keystream)
            clock("encrypt", kernels.encrypt, planes, first, masks, keystream, message, secret)
        clock("check_up", kernels.check_up, image, planes)
        clock("unpack", kernels.unpack, packed, u)
        clock("check_down", kernels.check_down, rows, u)
        for first in range(0, k, LANES * blocks):
            piece = hint[first // LANES : first // LANES + blocks]
            clock("decrypt", kernels.decrypt, y, first, u, first, piece, scales, secret)
        return {part: value / (k * SLOTS) for part, value in spent.items()}

    return run


def main() -> None:
    """Parses arguments, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_json_option(parser)
    parser.add_argument("--width", type=int, default=2048, help="features K, a multiple of 16·blocks")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of 16 features at a time")
    parser.add_argument("--repeats", type=int, default=9, help="rounds over all instruction sets")
    arguments = parser.parse_args()
    if arguments.width < 1 or arguments.width % (LANES * arguments.blocks):
        parser.error("--width is a multiple of 16 times --blocks")
    restart_tuned()
    before = environment()
    keep_freed_memory()
    torch.set_num_threads(1)
    best = NativeRing.best()
    if best is None:
        parser.error("the kernels were not compiled: reinstall hetrain where there is a C compiler")
    laps = rounds(
        {
            name: contestant(NativeRing(best.found, level), arguments.width, arguments.blocks)
            for level, name in enumerate(INSTRUCTION_SETS[: best.level + 1])
        },
        arguments.repeats,
    )
    cases = {
        name: {part: median(lap[part] for lap in given) for part in PARTS} for name, given in laps.items()
    }
    for parts in cases.values():
        parts["average"] = sum(parts.values()) / 2
    print(f"{before['processor']}; K = n = {arguments.width}, N = {SLOTS}; {CHECK_ROWS} rows of checks")
    print(table(cases))
    figures = {
        "width": arguments.width,
        "blocks": arguments.blocks,
        "check_rows": CHECK_ROWS,
        "ns_per_coefficient": cases,
        "targets_ns": TARGETS_NS,
        "environment": before,
    }
    write(figures, arguments.json)


def table(cases: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures in Markdown: a row for each instruction set."""
    rows = [
        (name, *(f"{parts[part]:.2f}" for part in PARTS), f"**{parts['average']:.2f}**", _target(name))
        for name, parts in cases.items()
    ]
    return markdown(("ns per coefficient", *PARTS, "average", "target"), rows)


def _target(name: str) -> str:
    return f"≤ {TARGETS_NS[name]:.0f}" if name in TARGETS_NS else ""


if __name__ == "__main__":
    main()
