"""Flower beside a real broker, worker and job, read in a real Chromium.

``HETRAIN_SCREENSHOT=docs/flower.png`` renews the picture of docs/monitoring.md (`make screenshot`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from base64 import b64encode
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import pytest
from playwright.sync_api import FloatRect, Page, expect, sync_playwright

from hetrain.public.broker.connection import parse_broker_url
from hetrain.public.protocol.messages import QUEUE
from tasks.supervisor.server import stop, tie_to_parent
from tests.harness.processes import HANDBOOK, broker_with_worker, connect, hetrain
from tests.harness.queue_messages import body, task_message
from tests.harness.waiting import eventually

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Root has no sandbox; the rest keeps it from looking for its maker's hosts.
QUIET = ("--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync")
LOGIN = "watcher:flower-secret-7"
PICTURE: FloatRect = {"x": 0, "y": 0, "width": 1400, "height": 702}
# The rows of each group's matrix and of its transpose, in the tiny model.
ROWS = {
    "self_attn.q_proj": (128, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (192, 64),
    "mlp.down_proj": (64, 96),
}
EXPECTED = {
    (direction, f"model.layers.{layer}.{group}"): rows[direction == "backward"]
    for layer in (0, 1)
    for group, rows in ROWS.items()
    for direction in ("forward", "backward")
}
# Nothing that is trained lies below the first layer's q, k and v.
del EXPECTED["backward", "model.layers.0.self_attn.q_proj"]

PRODUCT = re.compile(r"(forward|backward) (\d+):(\d+) (\S+)")
JOB = re.compile(r"job …[0-9a-f]{4} model tiny-llama")
RESULT = re.compile(r"'\d+\.\d{4} s on cpu · \w+ kernel, \w+ epilogue'")
DURATION = re.compile(r"\d+(\.\d+)? (µs|ms|s)")


@dataclass(frozen=True)
class FlowerServer:
    """Flower's address and process id, the worker that it observes, and the broker's URL."""

    url: str
    pid: int
    worker: str
    broker: str

    def get(self, path: str, login: str = LOGIN) -> tuple[int, str]:
        """Status and text of a page."""
        return fetch(self.url + path, login)


def fetch(url: str, login: str) -> tuple[int, str]:
    headers = {"Authorization": f"Basic {b64encode(login.encode()).decode()}"} if login else {}
    try:
        with urlopen(Request(url, headers=headers), timeout=20) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture(scope="module")
def flower(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlowerServer]:
    """Flower, which has seen one update of a job with the engine rlwe, and a task that still waits."""
    directory = tmp_path_factory.mktemp("flower")
    with ExitStack() as stack:
        broker = stack.enter_context(broker_with_worker(tiny_llama, threads=1))
        # Before Flower looks: a job without hints asks for each product with the masks, too.
        made = hetrain("prepare", tiny_llama, "--broker-url", broker.url)
        assert made.returncode == 0, made.stderr
        process, url = start_flower(broker.url, directory)
        stack.callback(stop, [process])
        name = eventually(lambda: next(iter(json.loads(fetch(f"{url}/api/workers?refresh=1", LOGIN)[1])), ""))

        arguments = ("--max-steps", 1, "--batch-tokens", 256, "--max-length", 64, "--engine", "rlwe")
        output = directory / "out"
        job = hetrain(
            "submit",
            HANDBOOK,
            "-m",
            tiny_llama,
            "--output-dir",
            output,
            "--broker-url",
            broker.url,
            *arguments,
        )
        assert job.returncode == 0, job.stderr

        eventually(lambda: covered(json.loads(fetch(f"{url}/api/tasks?state=SUCCESS", LOGIN)[1]).values()))
        yield FlowerServer(url, process.pid, name, broker.url)


def covered(tasks: Iterable[dict[str, Any]]) -> bool:
    """Whether the rows of these tasks make up each expected product exactly once, and nothing else."""
    products = [match.groups() for task in tasks if (match := PRODUCT.fullmatch(task["args"]))]
    parts: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for direction, first, end, group in products:
        parts.setdefault((direction, group), []).append((int(first), int(end)))
    ends = {}
    for product, ranges in parts.items():
        starts, stops = zip(*sorted(ranges), strict=True)
        if starts != (0, *stops[:-1]):
            return False
        ends[product] = stops[-1]
    return ends == EXPECTED


def start_flower(broker: str, directory: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Flower as README.md says, on a port of its choice; its process and address."""
    log = directory / "flower.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "tasks", "flower", "--port=0"],
            env=os.environ | {"HETRAIN_BROKER_URL": broker, "FLOWER_BASIC_AUTH": LOGIN},
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=tie_to_parent(),
        )
    try:
        url = eventually(lambda: re.search(r"Visit me at (http://\S+:\d+)", log.read_text()))
    except BaseException:
        stop([process])
        raise
    return process, url[1]


@pytest.fixture(scope="module")
def page(flower: FlowerServer) -> Iterator[Page]:
    """A page of a headless Chromium that knows Flower's user and password."""
    if CHROMIUM is None and os.environ.get("CI") != "true":
        reason = "Flower's pages were NOT looked at: install Debian's package chromium (make chromium)"
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    assert CHROMIUM, "make chromium installs it"
    user, secret = LOGIN.split(":")
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET) as browser,
    ):
        context = browser.new_context(
            http_credentials={"username": user, "password": secret},
            viewport={"width": 1400, "height": 800},
            color_scheme="light",
        )
        yield context.new_page()


def test_tasks_page_tells_what_each_task_is_about(page: Page, flower: FlowerServer, tmp_path: Path) -> None:
    page.goto(f"{flower.url}/tasks")
    rows = page.locator("#tasks-table tbody tr")
    expect(rows).to_have_count(15)
    page.screenshot(path=os.environ.get("HETRAIN_SCREENSHOT") or tmp_path / "flower.png", clip=PICTURE)
    page.get_by_label("Tasks per page").select_option("50")
    expect(page.locator("#tasks-table_info")).to_have_text(re.compile(r"Showing 1 to (\d+) of \1 tasks"))
    heads = page.locator(".dataTables_scrollHead th").all_text_contents()
    tasks = [dict(zip(heads, row.locator("td").all_inner_texts(), strict=True)) for row in rows.all()]
    assert covered(tasks)
    assert "prepare rlwe" in {task["args"] for task in tasks}
    for task in tasks:
        assert JOB.fullmatch(task["kwargs"]), task
        assert task["State"] == "SUCCESS"
        assert DURATION.fullmatch(task["Runtime"]), task
        assert RESULT.fullmatch(task["Result"]), task
        assert task["Worker"] == flower.worker


def test_task_leads_to_its_worker_and_the_worker_to_its_device(page: Page, flower: FlowerServer) -> None:
    page.goto(f"{flower.url}/tasks")
    row = page.locator("#tasks-table tbody tr", has_text="mlp.down_proj").first
    row.locator("a[href^='/task/']").click()
    details = page.locator("#task-page")
    for text in ("hetrain.evaluate", "SUCCESS", "ward 0:", "mlp.down_proj", "model tiny-llama", "on cpu ·"):
        expect(details).to_contain_text(text)
    details.get_by_role("link", name=flower.worker).click()
    pool = page.locator("#tab-pool")
    expect(pool.locator("tr", has_text="Device")).to_have_text(re.compile(r"cpu · \w+ kernel, \w+ epilogue"))
    expect(pool.locator("tr", has_text="Models")).to_contain_text("tiny-llama")


def test_workers_page_counts_its_tasks(page: Page, flower: FlowerServer) -> None:
    page.goto(f"{flower.url}/workers")
    row = page.locator("#workers-table tbody tr", has_text=flower.worker)
    expect(row).to_contain_text("Online")
    # One for each product at least, and the preparation.
    assert int(row.locator("td").nth(5).inner_text()) > len(EXPECTED)


def test_broker_page_reads_a_socket_with_a_password(page: Page, flower: FlowerServer) -> None:
    page.goto(f"{flower.url}/broker")
    expect(page.locator("#queue-table tbody tr").first).to_contain_text(QUEUE)


def test_no_page_has_a_message_or_the_password(flower: FlowerServer) -> None:
    address = parse_broker_url(flower.broker)
    password = address.credentials.lstrip(":")
    assert password
    shown = {"argsrepr": "a summary", "kwargsrepr": "of it"}
    connect(flower.broker).lpush(QUEUE, task_message(body(["the message"]), headers=shown, properties=shown))
    eventually(lambda: "a summary" in flower.get("/api/tasks")[1])
    paths = ["/", "/workers?json=1", "/tasks", "/broker", "/api/tasks", "/api/workers?refresh=1", "/metrics"]
    paths += [f"/task/{task}" for task in json.loads(flower.get("/api/tasks")[1])]
    for path in (f"/worker/{flower.worker}", *paths):
        status, text = flower.get(path)
        assert status == 200, path
        for secret in (password, "the message", "plan_digest"):
            assert secret not in text, path


@pytest.mark.parametrize("login", ["", "watcher:wrong", "other:flower-secret-7"])
def test_refuses_without_the_password(flower: FlowerServer, login: str) -> None:
    for path in (
        "/",
        "/tasks",
        "/tasks/datatable?draw=1&start=0&length=9",
        "/api/tasks",
        f"/worker/{flower.worker}",
    ):
        status, text = flower.get(path, login)
        assert (status, flower.worker in text) == (401, False), path


def test_only_shows_and_only_here(flower: FlowerServer) -> None:
    request = Request(f"{flower.url}/api/worker/shutdown/{flower.worker}", method="POST")
    request.add_header("Authorization", f"Basic {b64encode(LOGIN.encode()).decode()}")
    with pytest.raises(HTTPError, match="403"):
        urlopen(request, timeout=20)
    listening = [
        socket.laddr.ip
        for socket in psutil.Process(flower.pid).net_connections("inet")
        if socket.status == psutil.CONN_LISTEN
    ]
    assert listening == ["127.0.0.1"]
