"""What a run says of itself in its output directory: job.json and the model card."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import hetrain
from hetrain.config import JobSpec
from hetrain.public.disk import reason_of
from hetrain.public.errors import UsageError
from hetrain.public.model.files import public_name
from hetrain.secret.protection import protection_of
from hetrain.train.model_card import model_card
from hetrain.train.output_dir import OutputDirectory
from hetrain.train.records import read_run
from hetrain.train.session import BaseModelFiles, Session

_log = logging.getLogger(__name__)

_VERSIONED = ("torch", "transformers", "peft", "celery", "redis", "numpy", "cryptography")


def describe(spec: JobSpec, base: BaseModelFiles, session: Session) -> dict[str, object]:
    """job.json: everything needed to say what ran, and no secret: the broker's URL stays out."""
    return {
        "hetrain": hetrain.__version__,
        "model": spec.model,
        "model_path": str(base.files.directory.resolve()) if Path(spec.model).expanduser().is_dir() else None,
        "base_model": public_name(spec.model),
        "dataset": list(spec.dataset),
        "engine": spec.outsourcing.engine,
        "broker": "embedded" if spec.workers is None else "given",
        "device": spec.device,
        "protection": asdict(
            protection_of(spec.outsourcing.engine, session.split.plan, spec.outsourcing.verify_rows)
        ),
        "plan_digest": session.split.plan.digest,
        "worker": {"name": session.worker.worker, "device": session.worker.device},
        "init_from": None if spec.init_from is None else str(spec.init_from),
        "data": asdict(spec.data),
        "lora": asdict(spec.lora),
        "training": asdict(spec.training),
        "outsourcing": asdict(spec.outsourcing),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in _VERSIONED},
    }


def write_card(output: OutputDirectory) -> None:
    """Replaces the model card, from the records in `output`. That it cannot be written is a warning."""
    try:
        output.write_card(model_card(read_run(output.path)))
    except (OSError, UsageError) as error:
        _log.warning("the model card cannot be written: %s", error)


def write_job(output: OutputDirectory, job: Mapping[str, object]) -> None:
    """Replaces job.json. That it cannot be written is a warning."""
    try:
        output.write_job(job)
    except OSError as error:
        _log.warning("job.json cannot be written: %s", reason_of(error))
