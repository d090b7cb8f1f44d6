"""Norms and gates of the client's blocks, fused and by torch: ``python -m benchmarks.fused --json FILE``.

One norm of [2048, 576] and one gate of [2048, 1536], the sizes of SmolLM2-135M, forward and backward on one
thread, for every instruction set of this machine and for torch's own operations. Milliseconds of CPU time,
medians over rounds in which all run in turn. g and u are columns of one wider matrix, as they come from a
worker.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

from benchmarks.environment import environment
from benchmarks.output import add_json_option, markdown, rounds, write
from hetrain.nn import fused
from hetrain.nn.native.layers_library import NativeLayers
from hetrain.public.allocator import keep_freed_memory
from hetrain.public.compiled import INSTRUCTION_SETS

LAYERS = ("norm", "gate")
PARTS = ("forward", "backward")
EPSILON = 1e-5

Milliseconds = Callable[[], Mapping[str, float]]


def clocked(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], dy: torch.Tensor
) -> Milliseconds:
    """The milliseconds of CPU time of `function` and of its gradients with respect to the inputs."""
    leaves = [each.detach().requires_grad_() for each in inputs]

    def run() -> Mapping[str, float]:
        begin = time.thread_time_ns()
        y = function(*leaves)
        middle = time.thread_time_ns()
        torch.autograd.grad(y, leaves, dy)
        end = time.thread_time_ns()
        return {"forward": (middle - begin) / 1e6, "backward": (end - middle) / 1e6}

    return run


def contestants(tokens: int, hidden: int, width: int) -> dict[tuple[str, str], Milliseconds]:
    """Both layers, by layer and by what computes them."""
    x, weight, dx = torch.randn(tokens, hidden), torch.randn(hidden), torch.randn(tokens, hidden)
    wide, dy = torch.randn(tokens, 2 * width), torch.randn(tokens, width)

    def norm(function: Callable[..., torch.Tensor]) -> Milliseconds:
        return clocked(lambda x: function(x, weight, EPSILON), [x], dx)

    def gate(function: Callable[..., torch.Tensor]) -> Milliseconds:
        return clocked(function, wide.chunk(2, 1), dy)

    cases = {
        ("norm", "torch"): norm(fused.reference_rms_norm),
        ("gate", "torch"): gate(fused.reference_gated_silu),
    }
    best = NativeLayers.best()
    for name in INSTRUCTION_SETS[: best.level + 1] if best is not None else ():
        cases["norm", name] = _with(name, norm(fused.rms_norm))
        cases["gate", name] = _with(name, gate(fused.gated_silu))
    return cases


def _with(instructions: str, work: Milliseconds) -> Milliseconds:
    kernels = NativeLayers.best(instructions)

    def run() -> Mapping[str, float]:
        fused.layer_kernels = lambda: kernels
        return work()

    return run


def main() -> None:
    """Parses arguments, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_json_option(parser)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=576, help="width of the norm")
    parser.add_argument("--width", type=int, default=1536, help="width of the gate")
    parser.add_argument("--repeats", type=int, default=15, help="rounds over all cases")
    arguments = parser.parse_args()
    before = environment()
    keep_freed_memory()
    torch.set_num_threads(1)
    laps = rounds(contestants(arguments.tokens, arguments.hidden, arguments.width), arguments.repeats)
    cases = {
        case: {part: median(lap[part] for lap in given) for part in PARTS} for case, given in laps.items()
    }
    print(f"{before['processor']}; norm [{arguments.tokens}, {arguments.hidden}], ", end="")
    print(f"gate [{arguments.tokens}, {arguments.width}]")
    print(table(cases))
    figures = {
        "tokens": arguments.tokens,
        "hidden": arguments.hidden,
        "width": arguments.width,
        "ms": {layer: {name: cases[layer, name] for of, name in cases if of == layer} for layer in LAYERS},
        "environment": before,
    }
    write(figures, arguments.json)


def table(cases: Mapping[tuple[str, str], Mapping[str, float]]) -> str:
    """The figures in Markdown: a row for each layer and what computes it."""
    rows = []
    for (layer, name), parts in sorted(cases.items(), key=lambda case: LAYERS.index(case[0][0])):
        ratio = sum(cases[layer, "torch"].values()) / sum(parts.values())
        rows.append((layer, name, *(f"{parts[part]:.2f}" for part in PARTS), f"{ratio:.1f}"))
    return markdown(("ms of CPU time", "computed by", *PARTS, "times as fast"), rows)


if __name__ == "__main__":
    main()
