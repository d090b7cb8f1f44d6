"""`hetrain submit`: train an adapter."""

from __future__ import annotations

import logging

from cli.options import AsJson, Quiet, from_configuration
from cli.progress import TrainingDisplay
from hetrain import api
from hetrain.config import JobSpec


@from_configuration
def submit(spec: JobSpec, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Fine-tune a model with LoRA on workers that see only ciphertexts.

    Ctrl-C (or SIGTERM) once finishes the updates that have begun and writes adapter and checkpoint; twice
    leaves at once.
    """
    if quiet:
        logging.getLogger().setLevel(logging.ERROR)
    with TrainingDisplay(as_json=as_json, quiet=quiet) as display:
        result = api.finetune(
            **vars(spec),
            on_step=display.on_step,
            on_stop=display.on_stop,
            on_prepare=display.on_prepare,
            on_evaluating=display.on_evaluating,
            on_evaluation=display.on_evaluation,
        )
    display.summary(result)
