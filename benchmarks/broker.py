"""GB/s through a broker on this machine, and what they cost: ``python -m benchmarks.broker --json FILE``.

About two minutes. Client threads put and get blobs with the project's own `BlobStore`, each a blob of its
own over and over, on the server that an embedded installation starts. Blobs of 4 MiB are those of
SmolLM2-135M, of 16 and 64 MiB those of Llama-3.2-1B and Llama-3.1-8B, at 2048 tokens. Processor seconds are
those of the client process and of the servers, user and system. Medians over rounds in which all cases run
in turn.

Cases differ in the link (a Unix socket, as for embedded workers, or TCP over the loopback interface), in the
server's ``io-threads``, and in the number of servers, over which blobs are then spread. A server with one I/O
thread is one thread: 1 / (its seconds a GB) is the rate at which it fills a core.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

import psutil

from benchmarks.environment import environment
from benchmarks.output import add_json_option, markdown, rounds, write
from hetrain.public.allocator import keep_freed_memory, restart_tuned
from hetrain.public.broker.blobs import BlobStore
from hetrain.public.protocol.messages import new_token
from hetrain.public.protocol.tenants import new_job
from tasks.supervisor.server import private_directory, start_server
from tasks.supervisor.worker_process import stop

DIRECTIONS = ("put", "get")
_MIB = 1 << 20
_PASSWORD = "benchmark"
_SIZES = (4 * _MIB, 16 * _MIB, 64 * _MIB)

Reading = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Case:
    """How blobs travel: over which link, to how many servers of how many threads, from how many threads."""

    link: Literal["unix", "tcp"] = "tcp"
    io_threads: int = 1
    servers: int = 1
    client_threads: int = 1
    blob_bytes: int = 16 * _MIB


def cases() -> list[Case]:
    """All sizes on both links, then threads and servers with blobs of 16 MiB."""
    links: tuple[Literal["unix", "tcp"], ...] = ("unix", "tcp")
    sizes = [Case(link, blob_bytes=size) for link in links for size in _SIZES]
    threads = [Case(link, client_threads=count) for link in links for count in (2, 4)]
    spread = [Case(link, servers=2, client_threads=count) for link in links for count in (2, 4)]
    more = [Case(io_threads=io, client_threads=count) for io in (2, 4) for count in (1, 2, 4)]
    return sizes + threads + spread + more


@dataclass(frozen=True)
class Server:
    """A running server, and its address on each link."""

    process: psutil.Process
    urls: Mapping[str, str]

    def cpu_s(self) -> float:
        """Its processor seconds until now, user and system."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextmanager
def running(count: int) -> Iterator[list[Server]]:
    """Servers as an embedded installation starts them, which listen on the loopback interface as well."""
    with ExitStack() as stack:
        servers = []
        for _ in range(count):
            directory = private_directory()
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            log = stack.enter_context((directory / "log").open("wb"))
            process, url = start_server(directory, log, password=_PASSWORD)
            stack.callback(stop, [process])
            port = _free_port()
            _configure(url, {"bind": "127.0.0.1", "port": port})
            tcp = f"redis://:{_PASSWORD}@127.0.0.1:{port}/0"
            servers.append(Server(psutil.Process(process.pid), {"unix": url, "tcp": tcp}))
        yield servers


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _configure(url: str, settings: Mapping[str, str | int]) -> None:
    store = BlobStore(url)
    for name, value in settings.items():
        store.client.config_set(name, value)
    store.close()


def measured(case: Case, servers: Sequence[Server], seconds: float) -> Reading:
    """For each direction GB/s, and processor seconds of client and servers for a GB."""
    used = servers[: case.servers]
    stores = [BlobStore(server.urls[case.link]) for server in used]
    job, data = new_job(), os.urandom(case.blob_bytes)
    for store in stores:
        store.client.config_set("io-threads", case.io_threads)

    def repeat(thread: int) -> dict[str, Callable[[], object]]:
        store, token = stores[thread % len(stores)], new_token()
        blob = store.put(job, "in", token, [data])
        return {"put": lambda: store.put(job, "in", token, [data]), "get": lambda: store.get(blob)}

    try:
        actions = [repeat(thread) for thread in range(case.client_threads)]
        return {
            direction: _rate([action[direction] for action in actions], case.blob_bytes, used, seconds)
            for direction in DIRECTIONS
        }
    finally:
        for store in stores:
            store.client.flushdb()
            store.close()


def _rate(
    actions: Sequence[Callable[[], object]], nbytes: int, servers: Sequence[Server], seconds: float
) -> dict[str, float]:
    def repeatedly(action: Callable[[], object]) -> int:
        done = 0
        while time.perf_counter() < end:
            action()
            done += 1
        return done

    with ThreadPoolExecutor(len(actions)) as pool:
        list(pool.map(lambda action: action(), actions))
        client, server = time.process_time(), sum(one.cpu_s() for one in servers)
        begin = time.perf_counter()
        end = begin + seconds
        gigabytes = sum(pool.map(repeatedly, actions)) * nbytes / 1e9
        elapsed = time.perf_counter() - begin
    return {
        "gb_per_s": gigabytes / elapsed,
        "client_s_per_gb": (time.process_time() - client) / gigabytes,
        "server_s_per_gb": (sum(one.cpu_s() for one in servers) - server) / gigabytes,
    }


def medians(readings: Sequence[Reading]) -> Reading:
    """Of each figure by itself."""
    return {
        direction: {
            name: median(reading[direction][name] for reading in readings) for name in readings[0][direction]
        }
        for direction in DIRECTIONS
    }


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """A row for every case."""
    rows = [
        (
            {"unix": "Unix socket", "tcp": "TCP"}[cell["link"]],
            str(cell["servers"]),
            str(cell["io_threads"]),
            str(cell["client_threads"]),
            str(cell["blob_bytes"] // _MIB),
            *(text for direction in DIRECTIONS for text in _texts(cell[direction])),
        )
        for cell in cells
    ]
    header = ("link", "servers", "I/O threads", "client threads", "MiB a blob")
    costs = ("{}, GB/s", "client, CPU-s a GB", "server, CPU-s a GB")
    return markdown((*header, *(cost.format(name) for name in DIRECTIONS for cost in costs)), rows)


def _texts(figures: Mapping[str, float]) -> tuple[str, str, str]:
    rate, client, server = (figures[name] for name in ("gb_per_s", "client_s_per_gb", "server_s_per_gb"))
    return f"{rate:.1f}", f"{client:.2f}", f"{server:.2f}"


def main() -> None:
    """Parses arguments, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_json_option(parser)
    parser.add_argument("--seconds", type=float, default=0.5, help="for which each case runs, each way")
    parser.add_argument("--repeats", type=int, default=4, help="rounds over all cases; one more comes before")
    arguments = parser.parse_args()
    restart_tuned()
    before = environment()
    keep_freed_memory()
    with running(max(case.servers for case in cases())) as servers:
        laps = rounds(
            {case: lambda case=case: measured(case, servers, arguments.seconds) for case in cases()},  # type: ignore[misc]
            arguments.repeats,
        )
    cells = [{**asdict(case), **medians(given)} for case, given in laps.items()]
    print(table(cells))
    figures = {"seconds": arguments.seconds, "repeats": arguments.repeats, "cells": cells}
    write({**figures, "environment": before, "load_after": os.getloadavg()}, arguments.json)


if __name__ == "__main__":
    main()
