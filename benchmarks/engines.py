"""Each engine's costs and errors, shape by shape: ``python -m benchmarks.engines --json FILE``.

Both halves of an engine run in this process, in turn, each with all cores. Measured per engine and shape:

- the worker's part, from the payload's bytes to the result's, in weight·tokens/s = K·N·T / s, and how that
  compares with torch's fp32 product of the same K, N and T in the same run;
- encryption per input value, and verification and decryption per output value (K·T and N·T of them),
  serialised form included;
- bytes on the wire per input and output value;
- the error of a token's result, ‖y − ŷ‖ / ‖y‖ against the float64 product with the int8 matrix, median over
  all tokens that were multiplied: what rounding the activations and what the scheme add together;
- the largest error against the exact product of the rounded activations, in units of that product and over
  its largest entry: the scheme's part alone, and the rounding of a result to float32;
- sizes of serialised keys.

`rlwe` has its hints from the start. concrete-ml-extensions, Zama's library for the same product
(``pip install concrete-ml-extensions==0.2.0``), is measured beside them where it is installed. Seconds are
medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.engines_under_test import (
    PEER,
    TRAITS,
    EngineUnderTest,
    Measurement,
    Rounding,
    missing,
    open_engine_under_test,
)
from benchmarks.environment import environment
from benchmarks.output import add_json_option, write
from benchmarks.workloads import WORKLOADS, Workload
from hetrain.public.concrete.package import PACKAGE
from hetrain.public.lattice.parameters import SLOTS
from hetrain.public.system import available_cores
from worker_gpu.device import Compute, choose_compute, choose_device

_FULL = dict.fromkeys(("rlwe", "clear"), (2048, 512))
# Tokens of one operand, by shape and engine: as many as take some seconds at most.
TOKENS: Mapping[str, Mapping[str, tuple[int, ...]]] = MappingProxyType(
    {
        "tiny": {**_FULL, "concrete": (16,), PEER: (1,)},
        "smollm2": {**_FULL, "concrete": (8,), PEER: (1,)},
        "llama": {**_FULL, "concrete": (2,), PEER: (1,)},
    }
)
# Shapes on which an engine runs only with --all.
SLOW = frozenset({("llama", "concrete"), ("llama", PEER)})

_MIN_PRODUCTS, _LIMIT_S = 3, 15.0
_GEMM_PRODUCTS, _GEMM_LIMIT_S = 25, 2.0
_CPU_RESOLUTION_S = 0.1  # processor seconds of other threads arrive late


def multiply_repeatedly(
    engine: EngineUnderTest, x: torch.Tensor, tokens: int, repeats: int
) -> list[tuple[torch.Tensor, Measurement]]:
    """`repeats` products, or as many as fit into a quarter of a minute, but three at least.

    Each with its operand: the next `tokens` rows of x, from the start again when there are no more.
    """
    operands = cycle(torch.split(x[: len(x) // tokens * tokens], tokens))
    done: list[tuple[torch.Tensor, Measurement]] = []
    begin = time.perf_counter()
    while len(done) < min(repeats, _MIN_PRODUCTS) or (
        len(done) < repeats and time.perf_counter() - begin < _LIMIT_S
    ):
        operand = next(operands)
        done.append((operand, engine.multiply(operand)))
    return done


def gemm_s(matrix: torch.Tensor, x: torch.Tensor, device: torch.device) -> list[float]:
    """Seconds of torch's fp32 product of the same shape, up to 25 times."""
    w, operand = matrix.to(device, torch.float32), x.t().contiguous().to(device)
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < _GEMM_PRODUCTS and time.perf_counter() - begin < _GEMM_LIMIT_S:
        started = time.perf_counter()
        float((w @ operand)[0, 0])  # reading a value waits for the device
        seconds.append(time.perf_counter() - started)
    return seconds


def errors(workload: Workload, x: torch.Tensor, y: torch.Tensor, rounding: Rounding) -> dict[str, float]:
    """Distance of ŷ from x·Qᵀ, and from the exact product of the rounded x; see the module."""
    q = workload.matrix.t().to(torch.float64)
    truth, got = x.to(torch.float64) @ q, y.to(torch.float64)
    operand = rounding.quantize(x)
    exact = operand.values.to(torch.float64) @ q  # below 2^53
    units = (got / operand.scales.to(torch.float64)[:, None]).round()
    largest = float((units - exact).abs().max())
    return {
        "token_error": float(((got - truth).norm(dim=1) / truth.norm(dim=1)).median()),
        "largest_error_units": largest,
        "largest_error": largest / float(exact.abs().max()),
    }


def measure(
    name: str, workload: Workload, engine: EngineUnderTest, tokens: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """All figures of one engine on one shape at `tokens` tokens per operand."""
    n, k = workload.matrix.shape
    plain = gemm_s(workload.matrix, workload.x[:tokens], device)
    operands, done = zip(*multiply_repeatedly(engine, workload.x, tokens, repeats), strict=True)
    plain_s = statistics.median(plain + gemm_s(workload.matrix, workload.x[:tokens], device))
    distinct = min(len(done), len(workload.x) // tokens)
    x, y = torch.cat(operands[:distinct]), torch.cat([one.y for one in done[:distinct]])
    seconds = {
        part: statistics.median(getattr(one, part) for one in done)
        for part in ("encrypt_s", "worker_s", "decrypt_s")
    }
    last, work = done[-1], n * k * tokens
    return {
        "engine": name,
        "shape": workload.name,
        "what": workload.what,
        "k": k,
        "n": n,
        "tokens": tokens,
        "repeats": len(done),
        **seconds,
        "weight_tokens_per_s": work / seconds["worker_s"],
        "gemm_weight_tokens_per_s": work / plain_s,
        "ratio_to_gemm": plain_s / seconds["worker_s"],
        "worker_cores": _cores(done),
        "encrypt_ns_per_value": 1e9 * seconds["encrypt_s"] / (k * tokens),
        "decrypt_ns_per_value": 1e9 * seconds["decrypt_s"] / (n * tokens),
        "bytes_per_input": last.bytes_up / (k * tokens),
        "bytes_per_output": last.bytes_down / (n * tokens),
        "error_tokens": len(x),
        **errors(workload, x, y, engine.rounding),
        "keys": asdict(engine.keys),
    }


def _cores(done: Sequence[Measurement]) -> float | None:
    """Cores that the worker's part kept busy on average; None when it was too short to tell."""
    wall, cpu = sum(one.worker_s for one in done), sum(one.worker_cpu_s for one in done)
    return cpu / wall if wall > _CPU_RESOLUTION_S else None


def table(figures: Iterable[Mapping[str, Any]]) -> str:
    """The figures in Markdown."""
    header = (
        "engine", "K × N", "tokens", "worker", "weight·tokens/s", "of fp32 GEMM", "cores", "encrypt a value",
        "verify and decrypt a value", "bytes per input", "per output", "error of a token", "largest error",
        "secret key", "evaluation keys",
    )  # fmt: skip
    rows = [header, ("---",) * len(header), *map(_row, figures)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(figure: Mapping[str, Any]) -> tuple[str, ...]:
    keys = figure["keys"]
    return (
        figure["engine"],
        f"{figure['k']} × {figure['n']}",
        str(figure["tokens"]),
        _scaled(figure["worker_s"], _TIMES),
        f"{figure['weight_tokens_per_s']:.2g}",
        f"{figure['ratio_to_gemm']:.2g}",
        "" if figure["worker_cores"] is None else f"{figure['worker_cores']:.1f}",
        _scaled(figure["encrypt_ns_per_value"] * 1e-9, _TIMES),
        _scaled(figure["decrypt_ns_per_value"] * 1e-9, _TIMES),
        f"{figure['bytes_per_input']:.1f}",
        f"{figure['bytes_per_output']:.1f}",
        f"{100 * figure['token_error']:.2g} %",
        f"{figure['largest_error']:.1e}" if figure["largest_error"] else "exact",
        _scaled(keys["secret_bytes"], _SIZES),
        _scaled(keys["evaluation_bytes"], _SIZES),
    )


_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_SIZES = ((1e6, "MB"), (1e3, "kB"), (1, "B"))


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    scale, unit = next((pair for pair in units if value >= pair[0]), units[-1])
    return f"{value / scale:.3g} {unit}"


def installed(package: str) -> str | None:
    """Its version, None when it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def run(arguments: argparse.Namespace, compute: Compute) -> dict[str, Any]:
    """Measures the chosen engines and shapes, and prints each as it begins."""
    skipped = {name: why for name in arguments.engines if (why := missing(name))}
    for name, why in skipped.items():
        print(f"{name} is skipped: {why}", flush=True)
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for workload in [WORKLOADS[shape](Path(folder)) for shape in arguments.shapes]:
            for name in arguments.engines:
                if name in skipped or ((workload.name, name) in SLOW and not arguments.all):
                    continue
                engine = open_engine_under_test(name, workload, compute)
                for tokens in arguments.tokens or TOKENS[workload.name][name]:
                    print(f"{workload.name}: {name}, {tokens} tokens", flush=True)
                    figures.append(measure(name, workload, engine, tokens, arguments.repeats, compute.device))
    return {"figures": figures, "skipped": skipped}


def main() -> None:
    """Parses arguments, measures, prints, writes."""
    engines = (*TRAITS, PEER)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_json_option(parser)
    parser.add_argument("--shapes", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--engines", nargs="+", choices=engines, default=list(engines))
    parser.add_argument("--tokens", nargs="+", type=int, help="tokens per operand, for every engine alike")
    parser.add_argument(
        "--repeats", type=int, default=9, help="products per figure; slow ones fewer, three at least"
    )
    parser.add_argument("--all", action="store_true", help="slow engines on the largest shape too")
    arguments = parser.parse_args()
    if not all(1 <= tokens <= SLOTS for tokens in arguments.tokens or ()) or arguments.repeats < 1:
        parser.error(f"--tokens is 1 to {SLOTS}, --repeats at least 1")
    before = environment()
    compute = choose_compute(choose_device())
    measured = run(arguments, compute)
    print(table(measured["figures"]))
    figures = {
        **measured,
        "worker": compute.description,
        "threads": {"torch": torch.get_num_threads(), "concrete": available_cores()},
        "packages": {package: installed(package) for package in (PACKAGE, PEER)},
        "environment": before,
        "load_after": os.getloadavg(),  # beyond what this run keeps busy itself, others were at work
    }
    write(figures, arguments.json)


if __name__ == "__main__":
    main()
