"""Sends tasks to the workers' queues, by name: the client knows no worker code."""

from __future__ import annotations

from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from hetrain.public.broker.connection import KEEPALIVE, broker_errors, parse_broker_url, while_full
from hetrain.public.protocol.messages import TASK_EVALUATE, TASK_PREPARE, EvaluateTask, PrepareTask
from hetrain.transport.requests.request import Request


class Sender:
    """A Celery producer on the broker at `url`. Thread-safe."""

    def __init__(self, url: str) -> None:
        self._url = url
        address = parse_broker_url(url).for_celery()
        self._app = Celery("hetrain-client", set_as_current=False)
        self._app.conf.update(
            # Both: CELERY_BROKER_URL in the environment would replace broker_url.
            broker_read_url=address,
            broker_write_url=address,
            broker_transport_options={
                "socket_timeout": 30,
                "socket_connect_timeout": 5,
                **KEEPALIVE,
            },
            broker_pool_limit=64,
            task_serializer="json",
            accept_content=["json"],
            task_ignore_result=True,
        )

    def send(self, request: Request, queue: str, *, full_s: float) -> None:
        """Puts the request's task on `queue`; again and again under the same id.

        Raises:
            BrokerUnreachable: the broker cannot be reached.
            BrokerFull: the broker had no memory for it for `full_s` seconds.
        """
        while_full(lambda: self._send_once(request, queue), limit_s=full_s)

    def close(self) -> None:
        """Ends the app. Its connections stay: kombu shares them among all apps with the same address."""
        self._app.close()

    def _send_once(self, request: Request, queue: str) -> None:
        name = TASK_EVALUATE if isinstance(request.task, EvaluateTask) else TASK_PREPARE
        with broker_errors(self._url):
            try:
                self._app.send_task(
                    name,
                    args=[request.task.to_json()],
                    task_id=request.id,
                    queue=queue,
                    declare=[],  # workers do; so a client may push to the queue, and needs no other right
                    argsrepr=_product(request.task),
                    kwargsrepr=f"job …{request.task.job[-4:]} model {request.task.model}",
                    # By default these tell the client's host and process.
                    origin="hetrain",
                    reply_to="hetrain",
                    ignore_result=True,
                    retry=False,
                )
            except OperationalError as error:
                cause = error.__cause__
                raise (cause if isinstance(cause, RedisError | OSError) else OSError(str(error))) from error


def _product(task: PrepareTask | EvaluateTask) -> str:
    """What is asked for: Flower's column ``args``, beside job and model in its column ``kwargs``."""
    if isinstance(task, EvaluateTask):
        # Flower cuts a column off after about 45 characters, so the group, which may be longer, comes last.
        return f"{task.direction} {task.start}:{task.stop} {task.group}"
    return f"prepare {task.engine}"
