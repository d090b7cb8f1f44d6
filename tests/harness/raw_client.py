"""Workers without a supervisor, and a client without a router."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import redis
from celery import Celery

from hetrain.public.broker.blobs import BlobStore
from hetrain.public.broker.connection import parse_broker_url
from hetrain.public.protocol import keys
from hetrain.public.protocol.messages import (
    CONTROL_REPORT,
    TASK_EVALUATE,
    TASK_PREPARE,
    Completion,
    EvaluateTask,
    PrepareTask,
    new_token,
    parse,
)
from hetrain.public.protocol.plan import Plan
from hetrain.public.protocol.registration import REGISTRY_KEY, WorkerRegistration
from tasks.supervisor.server import stop
from tasks.supervisor.worker_process import spawn_worker
from tests.harness.checkpoints import OUT
from tests.harness.processes import BrokerServer
from tests.harness.queue_messages import body, task_message


class RawClient:
    """A client without router: it puts tasks into the queue that a test names.

    Attributes:
        job: its token.
    """

    def __init__(self, url: str, plan: Plan, job: str = "") -> None:
        self._app = Celery(broker=parse_broker_url(url).for_celery(), set_as_current=False)
        self._store = BlobStore(url)
        self.job, self._plan = job or new_token(), plan
        self._started: set[str] = set()
        self._ended: dict[str, Completion] = {}
        self._store.client.set(keys.alive(self.job), keys.ALIVE_VALUE, ex=600)
        self._blob = self._store.put(self.job, "plan", plan.digest, [memoryview(plan.to_bytes())])

    def prepare(self, queue: str) -> str:
        """Returns the request's name."""
        return self._send(TASK_PREPARE, PrepareTask, queue)

    def evaluate(self, queue: str, group: int, x: np.ndarray) -> str:
        """Returns the request's name."""
        operand = self._store.put(self.job, "in", new_token(), [memoryview(x).cast("B")])
        rows = {"start": 0, "stop": OUT, "direction": "forward", "header": {}, "input": operand}
        return self._send(TASK_EVALUATE, EvaluateTask, queue, group=f"g{group}", **rows)

    def _send(self, name: str, kind: type, queue: str, **fields: object) -> str:
        job = {"job": self.job, "plan": self._blob, "plan_digest": self._plan.digest}
        task = kind(request=new_token(), model="tiny", engine="clear", **job, **fields)
        message = task_message(body([task.to_json()]), queue=queue, headers={"task": name})
        self._store.client.lpush(queue, message)
        return str(task.request)

    def answer(self, request: str) -> Completion:
        """How the request ended."""
        while request not in self._ended:
            self._listen()
        return self._ended[request]

    def await_start(self, request: str) -> None:
        """Returns when a worker has begun the request."""
        while request not in self._started:
            self._listen()

    def _listen(self) -> None:
        popped = self._store.client.blpop([keys.done_list(self.job)], timeout=25)
        assert popped is not None, "no worker answers"
        completion = parse(Completion, popped[1], where="done-list")
        if completion.state == "started":
            self._started.add(completion.request)
        else:
            self._ended[completion.request] = completion

    def result(self, request: str) -> np.ndarray:
        """The product of a request that succeeds, [T, OUT]."""
        completion = self.answer(request)
        assert completion.output is not None, completion
        return np.frombuffer(self._store.get(completion.output), np.int32).reshape(-1, OUT)

    def about(self) -> list[dict[str, object]]:
        """The reports of the workers."""
        replies = self._app.control.broadcast(CONTROL_REPORT, reply=True, timeout=5, limit=1)
        return [report for reply in replies for report in reply.values()]

    def close(self) -> None:
        self._store.close()
        self._app.close()


def registrations(client: redis.Redis) -> dict[str, tuple[WorkerRegistration, float]]:
    """Worker -> its registration and the moment at which it expires, of all that have not expired."""
    seconds, microseconds = client.time()
    found = client.zrangebyscore(REGISTRY_KEY, seconds + microseconds / 1e6, "+inf", withscores=True)
    parsed = [(parse(WorkerRegistration, member, where=REGISTRY_KEY), score) for member, score in found]
    return {registration.worker: (registration, score) for registration, score in parsed}


@contextmanager
def workers(
    broker: BrokerServer, model: Path, count: int = 1, **settings: str
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Workers ``w0@…``, ``w1@…`` without a supervisor."""
    settings = {
        "HETRAIN_BROKER_URL": broker.url,
        "HETRAIN_MODELS": str(model),
        "OMP_NUM_THREADS": "1",
    } | settings
    running = [spawn_worker(f"w{index}", settings, broker.log) for index in range(count)]
    try:
        yield running
    finally:
        stop(running)
