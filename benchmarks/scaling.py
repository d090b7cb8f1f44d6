"""One client and many workers: ``python -m benchmarks.scaling --json FILE``, about five minutes.

The client's channel, the broker and the Celery workers are the real ones; only where a worker would multiply
it waits, for as long as the modelled GPU and network would take (`benchmarks.delayed`,
`benchmarks.hardware`). Each micro-batch in flight is a thread that asks for the products of a decoder block
over and over, forward and backward, each after the result of the one before, and none of them cut.

Client and broker here are a few cores. They stand for a modelled client (`ClientModel`) in this way: of every
matrix one row in ``share`` travels, and all modelled times are multiplied by the dilation

    D = (products per second that the modelled client is good for) / (those that this machine is good for),

the latter measured first, with workers that do not wait at all. So the ratio of a worker's speed to the
client's is that of the model. Efficiency is the modelled time of all products done, over the time that the
workers were there. Two parts: `transport` sends what is ready, and `client` also encrypts, verifies
and decrypts.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.delayed import Fleet, Pace, fleet
from benchmarks.environment import environment
from benchmarks.hardware import DECODERS, LLAMA_8B, ClientModel, ProductModel, Work, WorkerModel
from benchmarks.output import add_json_option, markdown, write
from hetrain.public.allocator import keep_freed_memory
from hetrain.public.errors import HetrainError, UsageError
from hetrain.public.lattice.header import RlweHeader
from hetrain.public.lattice.parameters import SLOTS, parameters_for
from hetrain.public.lattice.result_format import ResultFormat
from hetrain.public.lattice.ring import LANES, MODULUS
from hetrain.public.model.quantization import Norms
from hetrain.public.protocol.messages import Header
from hetrain.public.protocol.plan import Group, Member, Plan, group_of
from hetrain.public.protocol.product import Operand, Product
from hetrain.secret.engines.rlwe.hints import HintStore
from hetrain.secret.engines.rlwe.seal import RlweClaim, RlweSealer
from hetrain.secret.verification.job import Verification, kept_rows
from hetrain.secret.verification.parts import PartsCheck
from hetrain.secret.verification.rows import CheckRows
from hetrain.transport.celery_channel import CeleryChannel
from hetrain.transport.channel import Channel, Reply
from tasks.supervisor.server import private_directory, start_server
from tasks.supervisor.worker_process import stop

SHARES: Mapping[str, int] = {"transport": 16, "client": 32}
"""One row in so many travels: with these a dilation of about one fits two cores."""
COUNTS = (1, 2, 4, 8, 16)
MODEL = LLAMA_8B.lower()
_TINY_SHARE = 2048
_CAPACITY_WORKERS, _CAPACITY_IN_FLIGHT = 4, 8
_WARM_UP_S = 1.0
_LOG_TAIL = 4000
_SEED = 7
_NORMS = Norms(l1=1 << 16, squares=1 << 24)

Step = Callable[[], Reply]


@dataclass(frozen=True)
class Done:
    """A product, when its result was there (seconds of `time.perf_counter`)."""

    at: float
    modelled_s: float
    bytes_up: int
    bytes_down: int


def rates(done: Sequence[Done]) -> dict[str, float]:
    """Per second, from one result to a later one: so neither end of the window counts a product in part.

    Raises:
        UsageError: fewer than two products.
    """
    ordered = sorted(done, key=lambda one: one.at)
    if len(ordered) < 2:
        raise UsageError("hardly a product was done in the window", where="--seconds", hint="take more")
    elapsed = ordered[-1].at - ordered[0].at
    return {
        "products": (len(ordered) - 1) / elapsed,
        "modelled_s": sum(one.modelled_s for one in ordered[1:]) / elapsed,
        "bytes_up": sum(one.bytes_up for one in ordered[1:]) / elapsed,
        "bytes_down": sum(one.bytes_down for one in ordered[1:]) / elapsed,
    }


@dataclass(frozen=True)
class Bench:
    """A client on a broker, and delayed workers behind it."""

    channel: Channel
    fleet: Fleet
    broker: psutil.Process
    products: tuple[ProductModel, ...]
    seconds: float
    folder: Path

    def run(self, pace: Pace, encrypts: bool, workers: int, in_flight: int) -> dict[str, Any]:
        """Rates over a window in which `in_flight` micro-batches keep `workers` workers busy."""
        crew = [psutil.Process(pid) for pid in self.fleet.resize(workers, pace)]
        steps = (
            encrypted(self.channel, self.products, pace, self.folder)
            if encrypts
            else ready_made(self.channel, self.products, pace)
        )
        done: list[Done] = []  # its append is atomic
        ended = threading.Event()
        with ThreadPoolExecutor(in_flight, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            threads = [
                pool.submit(self._multiply_repeatedly, steps, pace, first, done, ended)
                for first in range(in_flight)
            ]
            try:
                wait(threads, _WARM_UP_S, FIRST_EXCEPTION)
                before, begin = self._cpu(crew), time.perf_counter()
                wait(threads, self.seconds, FIRST_EXCEPTION)
                after, end = self._cpu(crew), time.perf_counter()
            finally:
                ended.set()
            for thread in threads:
                thread.result()
        measured = rates([one for one in done if begin <= one.at <= end])
        return {
            "workers": workers,
            "in_flight": in_flight,
            "products_per_s": measured["products"],
            "efficiency": measured["modelled_s"] / workers,
            "bytes_up_per_s": measured["bytes_up"],
            "bytes_down_per_s": measured["bytes_down"],
            "busy_cores": {name: (after[name] - before[name]) / (end - begin) for name in after},
        }

    def in_lock_step(self, pace: Pace, workers: int, in_flight: int, products: int, updates: int) -> float:
        """Products per second when all micro-batches in flight wait for each other after `products` each."""
        self.fleet.resize(workers, pace)
        steps, ends = ready_made(self.channel, self.products, pace), list[float]()
        barrier = threading.Barrier(in_flight, lambda: ends.append(time.perf_counter()))

        def update_repeatedly(first: int) -> None:
            try:
                for _ in range(updates + 1):
                    barrier.wait()
                    for place in islice(cycle(range(len(steps))), first, first + products):
                        steps[place]()
                barrier.wait()
            except BaseException:
                barrier.abort()
                raise

        with ThreadPoolExecutor(in_flight, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for thread in [pool.submit(update_repeatedly, first) for first in range(in_flight)]:
                thread.result()
        return updates * in_flight * products / (ends[-1] - ends[1])  # the first update does not count

    def _multiply_repeatedly(
        self, steps: Sequence[Step], pace: Pace, first: int, done: list[Done], ended: threading.Event
    ) -> None:
        """One product after the other; each thread begins elsewhere in the block."""
        for place in islice(cycle(range(len(steps))), first, None):
            if ended.is_set():
                return
            reply = steps[place]()
            modelled_s = pace.seconds(self.products[place])
            done.append(Done(time.perf_counter(), modelled_s, reply.bytes_up, reply.bytes_down))

    def _cpu(self, crew: Sequence[psutil.Process]) -> dict[str, float]:
        """Seconds of processor time until now."""
        every = psutil.cpu_times()
        return {
            "client": _used(psutil.Process()),
            "broker": _used(self.broker),
            "workers": sum(map(_used, crew)),
            "machine": sum(every) - every.idle - getattr(every, "iowait", 0.0),
        }


def _used(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def ready_made(channel: Channel, models: Sequence[ProductModel], pace: Pace) -> list[Step]:
    """Steps that send operands of zeros."""
    scaled = [pace.scaled(model) for model in models]
    zeros = memoryview(bytes(max(small.bytes_up for small in scaled)))
    operands = [
        Operand(_header(small), [zeros[: small.bytes_up]], result_bytes=small.bytes_down, row_step=model.n)
        for model, small in zip(models, scaled, strict=True)
    ]
    return [
        partial(channel.multiply, product, operand)
        for product, operand in zip(products_of_models(models), operands, strict=True)
    ]


def _header(model: ProductModel) -> Header:
    return RlweHeader(parameters=model.result_format.parameters.name, operand="ciphertext").to_wire()


def encrypted(channel: Channel, models: Sequence[ProductModel], pace: Pace, folder: Path) -> list[Step]:
    """Steps that encrypt a real operand under a fresh secret, and verify and decrypt the result."""
    hints = HintStore(folder)
    return [
        partial(SmallProduct.of(pace.scaled(model), hints).multiply, channel, whole)
        for model, whole in zip(models, products_of_models(models), strict=True)
    ]


@dataclass(frozen=True)
class SmallProduct:
    """What travels of a product: an operand, and a client that has rows and a hint for it."""

    product: Product
    sealer: RlweSealer
    x: torch.Tensor

    @staticmethod
    def of(model: ProductModel, hints: HintStore) -> SmallProduct:
        """With a random matrix, and a hint of random words."""
        generator = torch.Generator().manual_seed(_SEED)
        matrix = torch.randint(-127, 128, (model.n, model.k), dtype=torch.int8, generator=generator)
        member = Member(module=model.group, tensor=model.group, out_features=model.n)
        product = Product(group_of((member,), matrix), "forward")
        shape = (-(-model.n // LANES), SLOTS, LANES)
        hints.keep(product, [torch.randint(MODULUS, shape, dtype=torch.int32, generator=generator)])
        verification = Verification(kept_rows(product.group, matrix), lambda _: matrix)
        x = torch.randn(model.tokens, model.k, generator=generator)
        return SmallProduct(product, RlweSealer(verification, hints), x)

    def multiply(self, channel: Channel, whole: Product) -> Reply:
        """`whole` in one task; of its operand and result only those of the small product travel."""
        product, verification = self.product, self.sealer.verification
        sealed = self.sealer.seal(self.x, product)
        result_format = ResultFormat(parameters_for(len(self.x)))
        planes = result_format.read_operand(sealed.operand.payload[0], product.k, where=str(product))
        claim = _Accepted(planes, result_format, *verification.rows_of(product))
        opening = replace(sealed.opening, parts=PartsCheck(product, claim, verification.weights))
        reply = channel.multiply(
            whole,
            replace(sealed.operand, row_step=whole.n),
            lambda part: opening.check(replace(part, rows=(0, product.n))),
        )
        opening.open()
        return reply


class _Accepted(RlweClaim):
    """Its verdict is reached and ignored: delayed workers return zeros."""

    def holds(self, rows: CheckRows, results: Sequence[torch.Tensor]) -> bool:
        """True."""
        super().holds(rows, results)
        return True


def products_of_models(models: Sequence[ProductModel]) -> list[Product]:
    """The plan's products that the models stand for."""
    groups = {group.name: group for group in plan_of(models).groups}
    return [Product(groups[model.group], model.direction) for model in models]


def plan_of(products: Sequence[ProductModel]) -> Plan:
    """A plan of these products' groups; no worker loads any matrix for it."""
    groups = [
        Group(
            name=one.group,
            members=(Member(module=one.group, tensor=one.group, out_features=one.n),),
            in_features=one.k,
            forward=_NORMS,
            backward=_NORMS,
            digest="0" * 64,
        )
        for one in products
        if one.direction == "forward"
    ]
    return Plan(model=MODEL, groups=tuple(groups))


@contextmanager
def bench(products: tuple[ProductModel, ...], seconds: float) -> Iterator[Bench]:
    """A broker, a fleet without workers, and a client whose job is prepared."""
    with ExitStack() as stack:
        directory = private_directory()
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        log = stack.enter_context((directory / "log").open("wb"))
        server, url = start_server(directory, log)
        stack.callback(stop, [server])
        workers = stack.enter_context(fleet(url, MODEL, log))
        channel = CeleryChannel(url)
        stack.callback(channel.close)
        plan = plan_of(products)
        try:
            workers.resize(1, Pace(dilation=0))
            channel.prepare(plan.model, "rlwe", plan.to_bytes(), plan.digest)
            yield Bench(channel, workers, psutil.Process(server.pid), products, seconds, directory / "hints")
        except HetrainError:
            _say(Path(log.name).read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL:])
            raise


def part(
    bench: Bench, name: str, counts: tuple[Sequence[int], Sequence[int]], models: Models
) -> dict[str, Any]:
    """The dilation of one part, and its sweep over workers and micro-batches in flight."""
    encrypts, share = name == "client", SHARES[name]
    limits = models.client.limits(Work.of(bench.products, len(bench.products)))
    if not encrypts:
        del limits["cryptography"]
    reference = min(limits.values())
    capacity = bench.run(Pace(models.worker, 0.0, share), encrypts, _CAPACITY_WORKERS, _CAPACITY_IN_FLIGHT)
    dilation = models.dilation or reference / capacity["products_per_s"]
    pace = Pace(models.worker, dilation, share)
    _say(f"{name}: one row in {share}, times × {dilation:.3g}")
    cells = []
    for workers in counts[0]:
        for in_flight in counts[1]:
            cells.append(bench.run(pace, encrypts, workers, in_flight))
            _say(f"{name}: {workers} workers, {in_flight} in flight: {cells[-1]['efficiency']:.0%}")
    return {
        "share": share,
        "dilation": dilation,
        "client_limits_per_s": limits,
        "capacity": capacity,
        "cells": cells,
    }


@dataclass(frozen=True)
class Models:
    """The modelled hosts; `dilation` None derives it."""

    worker: WorkerModel
    client: ClientModel
    dilation: float | None = None


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All parts."""
    before = environment()
    worker = WorkerModel(network_bits_per_s=1e9 * arguments.worker_gbit)
    models = Models(worker, ClientModel(), arguments.dilation)
    products = DECODERS[LLAMA_8B].block(arguments.tokens)
    one = Work.of(products, len(products))
    with bench(products, arguments.seconds) as running:
        tiny = Pace(worker, 0.0, _TINY_SHARE)
        queue = running.run(tiny, False, _CAPACITY_WORKERS, _CAPACITY_IN_FLIGHT)
        parts = {
            name: part(running, name, (arguments.workers, arguments.in_flight), models)
            for name in arguments.parts
        }
    return {
        "shape": LLAMA_8B,
        "tokens": arguments.tokens,
        "seconds_per_cell": arguments.seconds,
        "worker": asdict(worker),
        "client": asdict(models.client),
        "mean_product": asdict(one)
        | {
            "network_s": worker.network_s(one),
            "pcie_s": worker.pcie_s(one),
            "compute_s": worker.compute_s(one),
            "worker_s": worker.seconds(one),
        },
        "queue": queue,
        "parts": parts,
        "environment": before,
        "load_after": os.getloadavg(),
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def table(figures: Mapping[str, Any]) -> str:
    """The model's mean product, and for each part efficiencies and what limits them."""
    product = figures["mean_product"]
    head = (
        f"{figures['shape']}, micro-batches of {figures['tokens']} tokens. A worker's mean product: "
        f"{1e3 * product['worker_s']:.1f} ms (network {1e3 * product['network_s']:.1f}, "
        f"PCIe {1e3 * product['pcie_s']:.1f}, tensor cores {1e3 * product['compute_s']:.1f}), "
        f"{product['bytes_up'] / 1e6:.0f} MB up and {product['bytes_down'] / 1e6:.0f} MB down."
    )
    sections = [head, _queue_line(figures["queue"])]
    for name, one in figures["parts"].items():
        sections += [
            f"**{name}**: {_dilation_line(one)}",
            _efficiencies(one, product["worker_s"]),
            _limits(one, product),
        ]
    return "\n\n".join(sections)


def _queue_line(queue: Mapping[str, Any]) -> str:
    costs = ", ".join(
        f"{name} {1e3 * queue['busy_cores'][name] / queue['products_per_s']:.1f} ms"
        for name in ("client", "broker", "workers")
    )
    return (
        f"The queue alone, tiny operands and no delay: {queue['products_per_s']:.0f} products/s; "
        f"processor time of one: {costs}."
    )


def _dilation_line(one: Mapping[str, Any]) -> str:
    limit, rate = min(one["client_limits_per_s"].items(), key=lambda pair: pair[1])
    return (
        f"the modelled client is good for {rate:.0f} products/s ({limit}); this machine, with one row in "
        f"{one['share']} and no delay, for {one['capacity']['products_per_s']:.0f}; "
        f"times × {one['dilation']:.3g}."
    )


def _efficiencies(one: Mapping[str, Any], worker_s: float) -> str:
    """Measured, and the most that the model allows."""
    client = min(one["client_limits_per_s"].values())
    rows: dict[int, list[str]] = {}
    for cell in one["cells"]:
        workers, in_flight = cell["workers"], cell["in_flight"]
        most = min(1.0, in_flight / workers, client * worker_s / workers)
        rows.setdefault(in_flight, []).append(f"{cell['efficiency']:.0%} of {most:.0%}")
    header = ("in flight \\ workers", *dict.fromkeys(str(cell["workers"]) for cell in one["cells"]))
    return markdown(header, [(str(in_flight), *row) for in_flight, row in rows.items()])


def _limits(one: Mapping[str, Any], product: Mapping[str, float]) -> str:
    """The most loaded run of each number of workers, in mean products and in the model's time and bytes."""
    last = {cell["workers"]: cell for cell in one["cells"]}
    client = min(one["client_limits_per_s"].values())
    scale = one["dilation"] * one["share"] * 8 / 1e9
    best_of_one = max((cell["efficiency"] for cell in one["cells"] if cell["workers"] == 1), default=0.0)
    rows = [
        (
            str(workers),
            str(cell["in_flight"]),
            f"{cell['efficiency'] * workers / product['worker_s']:.0f}",
            f"{cell['efficiency'] / best_of_one:.0%}" if best_of_one else "",
            f"{min(workers, cell['in_flight']) / product['worker_s']:.0f}",
            f"{client:.0f}",
            f"{cell['bytes_up_per_s'] * scale:.0f}",
            f"{cell['bytes_down_per_s'] * scale:.0f}",
            *(f"{cell['busy_cores'][name]:.2f}" for name in ("client", "broker", "workers", "machine")),
        )
        for workers, cell in last.items()
    ]
    header = (
        "workers",
        "in flight",
        "products/s",
        "of workers × one worker",
        "workers' limit",
        "client's limit",
        "Gbit/s up",
        "Gbit/s down",
        "busy cores here: client",
        "broker",
        "workers",
        "machine",
    )
    return markdown(header, rows)


def main() -> None:
    """Parses arguments, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_json_option(parser)
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--workers", nargs="+", type=int, default=COUNTS)
    parser.add_argument("--in-flight", nargs="+", type=int, default=COUNTS, help="micro-batches")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measured window")
    parser.add_argument("--tokens", type=int, default=SLOTS, help="per micro-batch")
    parser.add_argument(
        "--worker-gbit", type=float, default=WorkerModel().network_bits_per_s / 1e9, help="of each worker"
    )
    parser.add_argument("--dilation", type=float, help="of all modelled times; derived by default")
    arguments = parser.parse_args()
    if min(*arguments.workers, *arguments.in_flight) < 1 or not 1 <= arguments.tokens <= SLOTS:
        parser.error(f"--workers and --in-flight are at least 1, --tokens is 1 to {SLOTS}")
    if arguments.seconds <= 0 or arguments.worker_gbit <= 0 or (arguments.dilation or 1) <= 0:
        parser.error("--seconds, --worker-gbit and --dilation are positive")
    keep_freed_memory()  # as `hetrain submit` does
    try:
        figures = measure(arguments)
    except HetrainError as error:
        raise SystemExit(str(error)) from error
    print(table(figures))
    write(figures, arguments.json)


if __name__ == "__main__":
    main()
