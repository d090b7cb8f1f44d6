"""The worker's part alone against plain products of its shape: ``python -m benchmarks.gemm --json FILE``.

For every group of linears of GPT-2, SmolLM2-135M and Llama-3.2-1B, forward and backward:

- encrypted: `worker_gpu.engines.rlwe.RlweEngine.evaluate`, from the payload's bytes to the packed result's;
- plain: x·Wᵀ in fp32 and in fp64 over the same tokens;
- bare: the three `torch._int_mm` calls that an exact product takes at least, in the layout of operands that
  is fastest for this shape.

All of one shape run in turn, round after round. Seconds are medians; ratios are of these medians.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import geometric_mean, median
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.output import add_json_option, markdown, rounds, timed, write
from benchmarks.raw_int8 import fastest_layout, int_mm, waiting
from benchmarks.shapes import GROUPS
from hetrain.public.allocator import keep_freed_memory, restart_tuned
from hetrain.public.lattice.header import RlweHeader
from hetrain.public.lattice.parameters import SLOTS, parameters_for
from hetrain.public.lattice.result_format import DIGITS
from hetrain.public.protocol.messages import DIRECTIONS, Blob, Direction, EvaluateTask, Header, new_token
from worker_gpu.device import Compute, choose_compute, choose_device
from worker_gpu.engines.rlwe import RlweEngine

# Name of a ratio: its numerator, its denominator, and what it should be (geometric mean over all shapes).
RATIOS: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {
        "encrypted / fp32": ("encrypted", "fp32", "≤ 0.75"),
        "encrypted / fp64": ("encrypted", "fp64", ""),
        "bare int8 / encrypted": ("bare", "encrypted", "≥ 0.85"),
    }
)


@dataclass(frozen=True)
class ProductShape:
    """One of the two products with a group's matrix: [n, k] as this direction sees it."""

    model: str
    group: str
    direction: Direction
    k: int
    n: int


def products(models: Sequence[str]) -> Iterator[ProductShape]:
    """Both products of every group."""
    for model in models:
        for group in GROUPS[model]:
            for direction in DIRECTIONS:
                k, n = (group.k, group.n) if direction == "forward" else (group.n, group.k)
                yield ProductShape(model, group.name, direction, k, n)


def stored(product: ProductShape) -> torch.Tensor:
    """A random int8 matrix [n, k] as a worker holds it: backward, the transpose of a matrix by rows."""
    if product.direction == "forward":
        return torch.randint(-127, 128, (product.n, product.k), dtype=torch.int8)
    return torch.randint(-127, 128, (product.k, product.n), dtype=torch.int8).t()


def task(product: ProductShape, header: Header, nbytes: int) -> EvaluateTask:
    """The message that asks for this product."""
    job = new_token()
    return EvaluateTask(
        request=new_token(),
        job=job,
        model=product.model,
        engine="rlwe",
        plan=Blob(job=job, kind="plan", token=new_token(), nbytes=0),
        plan_digest=new_token(),
        group="group",
        direction=product.direction,
        start=0,
        stop=product.n,
        header=dict(header),
        input=Blob(job=job, kind="in", token=new_token(), nbytes=nbytes),
    )


def operations(
    product: ProductShape, tokens: int, compute: Compute
) -> tuple[dict[str, Callable[[], Any]], str]:
    """The operations to time, by name; and the layout of the bare int8 products."""
    parameters = parameters_for(tokens)
    matrix = stored(product).to(compute.device)
    planes = torch.randint(-128, 128, (DIGITS, parameters.ring_degree, product.k), dtype=torch.int8)
    payload = planes.numpy().data.cast("B")
    header = RlweHeader(parameters=parameters.name, operand="ciphertext").to_wire()
    engine, message = RlweEngine(compute), task(product, header, payload.nbytes)
    work: dict[str, Callable[[], Any]] = {"encrypted": partial(engine.evaluate, matrix, message, payload)}
    x = torch.randn(tokens, product.k, device=compute.device)
    for name, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):
        work[name] = partial(torch.matmul, x.to(dtype), matrix.to(dtype).t())
    layout = fastest_layout(matrix, parameters.ring_degree)
    work["bare"] = int_mm(matrix, parameters.ring_degree, layout, DIGITS)
    return work, layout


def measure(product: ProductShape, tokens: int, repeats: int, compute: Compute) -> dict[str, Any]:
    """Seconds and ratios of one product."""
    work, layout = operations(product, tokens, compute)
    with torch.inference_mode():
        measured = rounds({name: timed(waiting(run, compute.device)) for name, run in work.items()}, repeats)
    seconds = {name: median(values) for name, values in measured.items()}
    ratios = {name: seconds[above] / seconds[below] for name, (above, below, _) in RATIOS.items()}
    shape = {"model": product.model, "group": product.group, "direction": product.direction}
    return shape | {
        "k": product.k,
        "n": product.n,
        "bare_layout": layout,
        "seconds": seconds,
        "ratios": ratios,
    }


def table(figures: Mapping[str, Any]) -> str:
    """The ratios in Markdown, geometric means and targets last."""
    rows = [
        (one["model"], one["group"], one["direction"], f"{one['k']} × {one['n']}", *_numbers(one["ratios"]))
        for one in figures["products"]
    ]
    rows.append(("**geometric mean**", "", "", "", *_numbers(figures["geometric_means"])))
    rows.append(("target", "", "", "", *(goal for _, _, goal in RATIOS.values())))
    return markdown(("model", "linears", "direction", "K × N", *RATIOS), rows)


def _numbers(ratios: Mapping[str, float]) -> Iterator[str]:
    return (f"{ratios[name]:.2f}" for name in RATIOS)


def main() -> None:
    """Parses arguments, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_json_option(parser)
    parser.add_argument("--shapes", nargs="+", choices=GROUPS, default=list(GROUPS), help="models")
    parser.add_argument("--tokens", type=int, default=SLOTS)
    parser.add_argument("--repeats", type=int, default=7, help="rounds over all operations of a shape")
    arguments = parser.parse_args()
    if not 1 <= arguments.tokens <= SLOTS or arguments.repeats < 1:
        parser.error(f"--tokens is 1 to {SLOTS}, --repeats at least 1")
    restart_tuned()
    before = environment()
    keep_freed_memory()  # as a worker does, which also loads torch in `tuned_environment`
    compute = choose_compute(choose_device())
    measured = []
    for product in products(arguments.shapes):
        print(f"{product.model}: {product.group}, {product.direction}", flush=True)
        measured.append(measure(product, arguments.tokens, arguments.repeats, compute))
    figures = {
        "tokens": arguments.tokens,
        "repeats": arguments.repeats,
        "worker": compute.description,
        "products": measured,
        "geometric_means": {name: geometric_mean(one["ratios"][name] for one in measured) for name in RATIOS},
        "targets": {name: goal for name, (_, _, goal) in RATIOS.items() if goal},
        "environment": before,
        "load_after": os.getloadavg(),
    }
    print(table(figures))
    write(figures, arguments.json)


if __name__ == "__main__":
    main()
