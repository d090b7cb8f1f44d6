"""Leaves a worker the commands of remote control that change nothing, `COMMANDS`.

Messages with others are dropped before Celery sees them; this holds for whatever way a command may come.
"""

from __future__ import annotations

from celery import signals
from celery.worker.control import Panel

from tasks.intake.control_message import COMMANDS


@signals.worker_init.connect
def _remove_commands(**_: object) -> None:
    for registered in (Panel.data, Panel.meta):
        for name in set(registered) - set(COMMANDS):
            del registered[name]
