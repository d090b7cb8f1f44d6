"""The Celery app and its settings. Importing it is cheap: torch comes in when a worker process starts."""

from __future__ import annotations

import os
import sys
from typing import Any

from celery import Celery, signals
from celery.concurrency.prefork import TaskPool as PreforkPool

from hetrain.public.allocator import keep_freed_memory
from hetrain.public.broker.connection import KEEPALIVE, parse_broker_url, redacted
from hetrain.public.errors import HetrainError, UsageError
from hetrain.public.protocol.messages import QUEUE

EX_CONFIG = 78  # as in sysexits.h: to start again would not help
DEFAULT_URL = "redis://localhost:6379/0"


def broker_url() -> str:
    """HETRAIN_BROKER_URL, or the local server."""
    return os.environ.get("HETRAIN_BROKER_URL", DEFAULT_URL)


def _positive(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise UsageError(f"{name} must be a positive whole number", where=text[:100])
    return int(text)


def _settings() -> dict[str, Any]:
    address = parse_broker_url(broker_url()).for_celery()
    return {
        "broker_url": address,
        # Else CELERY_BROKER_URL would win, and tasks and blobs would go to different places.
        "broker_read_url": address,
        "broker_write_url": address,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,  # a worker outlives its broker, however long it is away
        # Else a broker that is out of memory for a moment ends the worker.
        "broker_channel_error_retry": True,
        "worker_consumer": "tasks.consumer:Consumer",
        "broker_transport_options": {
            "visibility_timeout": _positive("HETRAIN_VISIBILITY_TIMEOUT", 120),
            "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1,
            "unacked_mutex_expire": 5,
            **KEEPALIVE,
        },
        "include": ["tasks.evaluate", "tasks.inspect_command", "tasks.display", "tasks.heartbeat"],
        "task_default_queue": QUEUE,
        "accept_content": ["json"],
        "task_serializer": "json",
        "task_ignore_result": True,
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "task_send_sent_event": True,
        "worker_send_task_events": True,
        "worker_prefetch_multiplier": 1,
        # Threads do not fork, so CUDA may be used before the first task, and heartbeats go on during one.
        "worker_pool": "threads",
        "worker_concurrency": _positive("HETRAIN_WORKER_CONCURRENCY", 1),
    }


def _flower_defaults() -> None:
    """For ``celery -A tasks flower``, which reads them later; variables and options of the user win."""
    # Flower by itself listens everywhere, shuts down workers for whoever asks, and shows no arguments.
    os.environ.setdefault("FLOWER_ADDRESS", "127.0.0.1")
    os.environ.setdefault("FLOWER_READ_ONLY", "true")
    os.environ.setdefault("FLOWER_TASKS_COLUMNS", "args,kwargs,state,runtime,result,worker,received,uuid")


app = Celery("hetrain", set_as_current=False)
app.conf.update(_settings())
_flower_defaults()


@signals.worker_init.connect
def _before_the_pool(sender: Any, **_: object) -> None:
    """Settles queue and device before the first task is taken; a prefork parent must not touch the device."""
    _choose_queue()
    pool = sender.pool_cls
    if pool != "prefork" and not (isinstance(pool, type) and issubclass(pool, PreforkPool)):
        _start_service()


def _choose_queue() -> None:
    """A worker of some shards takes from their queue alone, whatever -Q says: others' tasks must not come."""
    from worker_gpu.weights.shards import served_shards

    try:
        shards = served_shards()
    except HetrainError as error:
        raise _cannot_start(error) from error
    if shards is not None:
        app.amqp.queues.select([shards.queue])


@signals.worker_process_init.connect
def _in_a_forked_child(**_: object) -> None:
    _start_service()


@signals.worker_ready.connect
def _tell_the_supervisor(**_: object) -> None:
    """Closes the pipe that an embedding supervisor waits on."""
    if text := os.environ.pop("HETRAIN_READY_FD", ""):
        os.write(int(text), b"r")
        os.close(int(text))


def _start_service() -> None:
    keep_freed_memory()
    try:
        from worker_gpu.service import service

        description = service().description
    except Exception as error:
        raise _cannot_start(error) from error
    sys.stderr.write(f"hetrain worker: {description}, broker {redacted(broker_url())}\n")


def _cannot_start(error: Exception) -> SystemExit:
    """Celery logs an Exception of a signal handler and goes on; a worker that can do nothing has to end."""
    sys.stderr.write(f"hetrain worker cannot start: {type(error).__name__}: {error}\n")
    return SystemExit(EX_CONFIG if isinstance(error, HetrainError) else 1)
