"""The Celery app and its settings. Importing it is cheap: torch comes in when a worker process starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from celery import Celery, signals
from celery.concurrency import get_implementation

from hetrain.public.allocator import keep_freed_memory, tuned_environment
from hetrain.public.broker.connection import KEEPALIVE, parse_broker_url, plaintext_warning, redacted
from hetrain.public.errors import HetrainError, ModelError, ModelUnreachable, UsageError, WorkerError
from hetrain.public.protocol.messages import QUEUE
from hetrain.public.protocol.registration import lane_queues
from hetrain.public.settings import WorkerSettings, broker_address
from tasks.intake import transport

_LASTING = (UsageError, ModelError, WorkerError)
"""What a worker that is started again would meet again: settings, its models, its device."""


def broker_url() -> str:
    """The broker's address."""
    return broker_address(WorkerSettings().broker_url)


def _configuration(settings: WorkerSettings) -> dict[str, Any]:
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
        # Kombu keeps no copies of messages under way: clients alone send again what is lost.
        # Nothing has priority, so a queue is one list and not four.
        "broker_transport_options": {"ack_emulation": False, "priority_steps": [0], **KEEPALIVE},
        "include": [
            "tasks.evaluate",
            "tasks.inspect_command",
            "tasks.remote_control",
            "tasks.display",
            "tasks.heartbeat",
        ],
        "task_default_queue": QUEUE,
        "accept_content": ["json"],
        "task_serializer": "json",
        "task_ignore_result": True,
        # With a multiplier of 1: a worker takes a message only when it can run it at once.
        "task_acks_late": True,
        "task_send_sent_event": True,
        "worker_send_task_events": True,
        "worker_prefetch_multiplier": 1,
        # No process is forked, so CUDA may be used before the first task, and heartbeats go on during one.
        "worker_pool": "threads",
        "worker_concurrency": settings.worker_concurrency or 1,
    }


def _set_flower_defaults() -> None:
    """For ``celery -A tasks flower``, which reads them later; variables and options of the user win."""
    # Flower's own: it listens on every address, may shut down workers, and shows no arguments.
    os.environ.setdefault("FLOWER_ADDRESS", "127.0.0.1")
    os.environ.setdefault("FLOWER_READ_ONLY", "true")
    os.environ.setdefault("FLOWER_TASKS_COLUMNS", "args,kwargs,state,runtime,result,worker,received,uuid")


def _refusal(error: Exception) -> SystemExit:
    """Ends the process: Celery would log an Exception of a signal handler and go on.

    A supervisor tries again unless the status is EX_CONFIG: that is for what cannot pass.
    """
    sys.stderr.write(f"hetrain worker cannot start: {type(error).__name__}: {error}\n")
    is_lasting = isinstance(error, _LASTING) and not isinstance(error, ModelUnreachable)
    return SystemExit(os.EX_CONFIG if is_lasting else 1)


transport.register()
app = Celery("hetrain", set_as_current=False)
try:
    app.conf.update(_configuration(WorkerSettings()))
except HetrainError as error:
    raise _refusal(error) from error
_set_flower_defaults()


@signals.worker_init.connect
def _start(sender: Any, **_: object) -> None:
    """Settles pool, queue and device before the first task is taken."""
    try:
        _require_threads(sender.pool_cls)
        keep_freed_memory()
        os.environ.update(tuned_environment(os.environ))  # before torch and OpenMP read theirs
        from worker_gpu.service import service
        from worker_gpu.weights.store import available_models

        description = service().description
        _select_queues(available_models())
    except Exception as error:
        raise _refusal(error) from error
    sys.stderr.write(f"hetrain worker: {description}, broker {redacted(broker_url())}\n")
    if warning := plaintext_warning(broker_url()):
        sys.stderr.write(f"hetrain worker: {warning}\n")


def _select_queues(models: Iterable[str]) -> None:
    """Adds the lanes of the worker's models. One of some shards takes from theirs alone, with any -Q."""
    shards, queues = WorkerSettings().shards, app.amqp.queues
    if shards is not None:
        queues.select([shards.queue, *lane_queues(shards.queue, models)])
    elif QUEUE in queues.consume_from:
        queues.select([*queues.consume_from, *lane_queues(QUEUE, models)])


def _require_threads(pool: str | type) -> None:
    """Raises `UsageError` for a pool of another kind. Celery itself replaces ``-P prefork`` by ours."""
    if get_implementation(pool) is not get_implementation("threads"):
        raise UsageError(
            "this worker's pool is not 'threads'",
            where="-P",
            hint="start it without -P: tasks share device, matrices and leases of one process",
        )


@signals.worker_ready.connect
def _report_ready(**_: object) -> None:
    """Closes the pipe on which a supervisor waits."""
    if (descriptor := WorkerSettings().ready_fd) is not None:
        os.write(descriptor, b"r")
        os.close(descriptor)
