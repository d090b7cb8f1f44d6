"""The client's cost of encryption: ``python -m benchmarks.client --json FILE``.

Encrypt is `hetrain.secret.engines.rlwe.seal.seal`, from float32 activations to the payload; decrypt is
`RlweOpening.open`, from the result's bytes to float32; each with hints and without. Then their parts, one by
one. Nanoseconds per coefficient, of which an operand of K features has K·N in ring degree N, and so has its
square product.

Two threads are two micro-batches in flight: Python threads with one torch thread each and operands of their
own, as in training; their time is divided by the coefficients of both. All run in turn, round after round;
figures are medians.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import mean, median
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.output import add_json_option, markdown, rounds, timed, write
from hetrain.public.allocator import keep_freed_memory
from hetrain.public.lattice.masks import MaskStream, PublicSeed
from hetrain.public.lattice.parameters import SLOTS, parameters_for
from hetrain.public.protocol.product import Part
from hetrain.secret.activation_quantization import token_scales
from hetrain.secret.engines.rlwe.hints import Hint
from hetrain.secret.engines.rlwe.kernels import BLOCK_ROWS, ScaledOperand, kernels
from hetrain.secret.engines.rlwe.seal import seal
from hetrain.secret.randomness import SecretStream, sample_ternary

THREADS = (1, 2)
TARGET_NS = 6.0
"""Encryption and decryption on average, two threads on two cores."""
WHOLE = ("encrypt", "decrypt")
_MAX_L1 = 30_000  # of SmolLM2's matrices: what fixes the range of quantised values


@dataclass(frozen=True)
class Case:
    """One figure: what is done, how wide (K features of `tokens` tokens), and by how many threads at once."""

    operation: str
    tokens: int
    k: int
    hints: bool | None
    threads: int

    @property
    def coefficients(self) -> int:
        """Of all threads together."""
        return self.threads * self.k * parameters_for(self.tokens).ring_degree


def whole(tokens: int, k: int, hints: bool) -> Mapping[str, Callable[[], object]]:
    """Encryption and decryption of one operand [tokens, k] and one result of k rows."""
    x = torch.randn(tokens, k)
    hint = ready_hint(k) if hints else None
    sealed = seal(x, _MAX_L1, None, hint)
    data = torch.randint(0, 256, (sealed.operand.result_row_bytes * k,), dtype=torch.uint8)
    part = Part((0, k), data.numpy().data.cast("B"))
    return {
        "encrypt": lambda: seal(x, _MAX_L1, None, hint),
        "decrypt": lambda: sealed.opening.open([part]),
    }


def ready_hint(rows: int) -> Hint:
    """A hint whose product is on disk; it is not the product of anything."""
    file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - lives as long as the hint
    hint = Hint(PublicSeed.fresh(), operand_rows=rows, rows=rows, sketch=None, file=file, offset=0)
    high = torch.randint(-(1 << 15), 1 << 15, (rows, SLOTS), dtype=torch.int16)
    low = torch.randint(0, 256, (rows, SLOTS), dtype=torch.uint8)
    hint.offer((high, low), Part((0, rows), memoryview(b"")))
    return hint


def parts(tokens: int, k: int) -> Mapping[str, Callable[[], object]]:
    """The parts of encryption and decryption, over the same coefficients and in the same blocks.

    "encrypt rows" and "decrypt rows" are one pass each: product with the secret, noise, rounding, scaling.
    """
    parameters = parameters_for(tokens)
    degree, dimension = parameters.ring_degree, parameters.dimension
    ternary = sample_ternary(SecretStream("hetrain.secret"), dimension)
    secret = kernels().transform(ternary.view(parameters.rank, degree))
    hint, mask_stream, noise_stream = (
        ready_hint(k),
        MaskStream(PublicSeed.fresh()),
        SecretStream("hetrain.noise"),
    )
    x, scales = torch.randn(tokens, k), torch.rand(tokens) + 1
    operand = ScaledOperand(x, scales, 1 << 15, parameters.eta)
    out, y = torch.empty(k, degree, dtype=torch.int32), torch.empty(tokens, k)
    masks = torch.empty(BLOCK_ROWS, dimension, dtype=torch.int32)
    keystream = torch.empty(6 * BLOCK_ROWS * degree, dtype=torch.uint8)
    b = torch.randint(-(1 << 15), 1 << 15, (BLOCK_ROWS, degree)).to(torch.int16)
    high, low = torch.empty_like(masks, dtype=torch.int16), torch.empty_like(masks, dtype=torch.uint8)
    mask_stream.fill(masks)
    noise_stream.fill(keystream)

    def each_block(work: Callable[[int, int], object]) -> None:
        for start in range(0, k, BLOCK_ROWS):
            work(start, min(BLOCK_ROWS, k - start))

    def encrypt(start: int, n: int) -> None:
        stream = keystream[: 6 * n * degree]
        kernels().encrypt(out[start : start + n], operand, start, masks[:n], stream, secret)

    return {
        "scales of tokens": lambda: token_scales(x, 1 << 15),
        "expand masks": lambda: each_block(lambda _, n: mask_stream.fill(masks[:n])),
        "keystream of noise": lambda: each_block(lambda _, n: noise_stream.fill(keystream[: 6 * n * degree])),
        "encrypt rows": lambda: each_block(encrypt),
        "read hints": lambda: each_block(lambda start, n: hint.read(start, (high[:n], low[:n]))),
        "decrypt rows": lambda: each_block(
            lambda start, n: kernels().decrypt(y, start, (b[:n], high[:n], low[:n]), scales, secret)
        ),
    }


def timed_cases(
    tokens: list[int], widths: list[int], pool: ThreadPoolExecutor
) -> dict[Case, Callable[[], float]]:
    """Every case, giving its seconds."""
    found: dict[Case, Callable[[], float]] = {}
    for count, k in ((count, k) for count in tokens for k in widths):
        for hints in (False, True, None):
            make = partial(parts, count, k) if hints is None else partial(whole, count, k, hints)
            copies = [make() for _ in range(max(THREADS))]  # operands of its own for each thread
            for operation in copies[0]:
                for threads in THREADS:
                    case = Case(operation, count, k, hints, threads)
                    found[case] = timed(partial(_run, pool, [copy[operation] for copy in copies[:threads]]))
    return found


def _run(pool: ThreadPoolExecutor, work: list[Callable[[], object]]) -> None:
    if len(work) == 1:
        work[0]()
        return
    for done in [pool.submit(one) for one in work]:
        done.result()


def averages(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Encryption and decryption on average over all shapes, by threads and hints."""
    for threads in THREADS:
        for hints in (False, True):
            chosen = [
                one["ns_per_coefficient"]
                for one in records
                if one["operation"] in WHOLE and one["threads"] == threads and one["hints"] is hints
            ]
            yield {"threads": threads, "hints": hints, "ns_per_coefficient": mean(chosen)}


def table(figures: Mapping[str, Any]) -> str:
    """The figures in Markdown: a row for each operation and shape, a column for each number of threads."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for one in figures["cases"]:
        key = (one["operation"], _HINTS[one["hints"]], str(one["tokens"]), str(one["k"]))
        rows.setdefault(key, []).append(f"{one['ns_per_coefficient']:.2f}")
    for one in figures["averages"]:
        key = ("**encrypt and decrypt, average**", _HINTS[one["hints"]], "", "")
        rows.setdefault(key, []).append(f"**{one['ns_per_coefficient']:.2f}**")
    goals = ["" if threads == 1 else f"≤ {figures['target_ns_two_threads']:.0f}" for threads in THREADS]
    rows["target", "", "", ""] = goals
    headings = [f"ns per coefficient, {threads} thread{'s'[: threads - 1]}" for threads in THREADS]
    return markdown(
        ("operation", "hints", "tokens", "K", *headings), [(*key, *row) for key, row in rows.items()]
    )


_HINTS = {False: "without", True: "with", None: ""}


def main() -> None:
    """Parses arguments, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_json_option(parser)
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 512])
    parser.add_argument("--widths", nargs="+", type=int, default=[576, 1536], help="features K")
    parser.add_argument("--repeats", type=int, default=15, help="rounds over all cases")
    arguments = parser.parse_args()
    if min(arguments.tokens) < 1 or max(arguments.tokens) > SLOTS or min(arguments.widths) < 1:
        parser.error(f"--tokens is 1 to {SLOTS}, --widths at least 1")
    if arguments.repeats < 1:
        parser.error("--repeats is at least 1")
    before = environment()
    keep_freed_memory()  # as `hetrain submit` does
    torch.set_num_threads(1)
    with ThreadPoolExecutor(max(THREADS), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        measured = rounds(timed_cases(arguments.tokens, arguments.widths, pool), arguments.repeats)
    cases = [
        {
            "operation": case.operation,
            "tokens": case.tokens,
            "k": case.k,
            "hints": case.hints,
            "threads": case.threads,
            "ns_per_coefficient": 1e9 * median(seconds) / case.coefficients,
        }
        for case, seconds in measured.items()
    ]
    figures = {
        "repeats": arguments.repeats,
        "cases": cases,
        "averages": list(averages(cases)),
        "target_ns_two_threads": TARGET_NS,
        "kernels": kernels().name,
        "torch_threads_each": 1,
        "environment": before,
        "load_after": os.getloadavg(),
    }
    print(table(figures))
    write(figures, arguments.json)


if __name__ == "__main__":
    main()
